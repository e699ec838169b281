"""Push a dataset's folder to the Hugging Face hub, replacing an earlier version of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from persyn.errors import PersynError, UsageError, shorten

if TYPE_CHECKING:
    from huggingface_hub.hf_api import DatasetInfo

#: Files that the hub itself adds to a new repository.
_ITS_OWN = {".gitattributes"}


@dataclass(frozen=True, slots=True)
class Pushed:
    """The location of a pushed dataset.

    is_new: whether a commit was made; False if the content was unchanged.
    """

    url: str
    is_private: bool
    is_new: bool


class Repository:
    """A dataset repository on the hub (HF_ENDPOINT), accessed with the token that huggingface_hub finds.

    Raises `UsageError` at once for an invalid name, a missing token, or if HF_HUB_OFFLINE is set.
    """

    def __init__(self, name: str) -> None:
        from huggingface_hub import HfApi, constants, get_token
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils._validators import validate_repo_id

        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise UsageError(f"{name!r} is not a valid repository name; give OWNER/NAME: {error}") from error
        if name.count("/") != 1:
            raise UsageError(f"{name!r} is not a valid repository name; give OWNER/NAME")
        if constants.HF_HUB_OFFLINE:
            raise UsageError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it for this command")
        if get_token() is None:
            raise UsageError("the hub requires a token with write access: set HF_TOKEN, or log in with 'hf auth login'")
        self.name = name
        self._api = HfApi()

    def push(
        self, folder: Path, *, message: str, public: bool, manifest: str, files_of: Callable[[bytes], set[str]]
    ) -> Pushed:
        """Upload the files of a folder, and delete files of an earlier dataset that it no longer has.

        public:   whether a new repository is public; an existing one keeps its visibility.
        manifest: the file that describes a dataset; `files_of` extracts the names of the dataset's files from it.
        Raises `UsageError` if the hub refuses, if the repository holds something else, and for a public one when
        `public` is False; `PersynError` if the hub cannot be reached, after which the same push can be repeated.
        """
        with _explained(self.name):
            self._api.create_repo(self.name, repo_type="dataset", private=not public, exist_ok=True)
            info = self._api.dataset_info(self.name)
            if not (info.private or public):
                raise UsageError(f"the repository {self.name} is public; give --public to push there")
            stale = self._earlier(info, manifest, files_of) - {path.name for path in folder.iterdir()}
            done = self._api.upload_folder(
                repo_id=self.name,
                repo_type="dataset",
                folder_path=folder,
                commit_message=message,
                delete_patterns=sorted(stale) or None,
            )
        return Pushed(f"{self._api.endpoint}/datasets/{self.name}", bool(info.private), done.oid != info.sha)

    def _earlier(self, info: DatasetInfo, manifest: str, files_of: Callable[[bytes], set[str]]) -> set[str]:
        """The files of the dataset in the repository; raise `UsageError` if it holds something else."""
        there = {file.rfilename for file in info.siblings or ()} - _ITS_OWN
        if not there:
            return set()
        path = self._api.hf_hub_download(self.name, manifest, repo_type="dataset") if manifest in there else None
        own = files_of(Path(path).read_bytes()) if path else set()
        if not own:
            raise UsageError(
                f"the repository {self.name} contains {min(there)!r}, which is not part of a PerSyn dataset; "
                "give another name"
            )
        return own & there


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Convert errors of the hub client to errors that say what to do."""
    from huggingface_hub import errors

    try:
        yield
    except errors.HfHubHTTPError as error:
        said = f"(HTTP {error.response.status_code}): {shorten(error.server_message or str(error))}"
        if error.response.status_code in (401, 403, 404):
            raise UsageError(
                f"the hub refused access to {name} {said}; "
                "the token needs write access to it: HF_TOKEN, or 'hf auth login'"
            ) from error
        raise PersynError(f"pushing to {name} failed {said}; repeat the command") from error
    except errors.HTTPError as error:  # type: ignore[attr-defined] # httpx's, of whichever version
        raise PersynError(f"the hub cannot be reached: {shorten(str(error))}; repeat the command") from error
    except (OSError, RuntimeError) as error:  # an interrupted upload, as reported by the client
        why = f"{error}{f': {error.__cause__}' if error.__cause__ else ''}"
        raise PersynError(f"pushing to {name} failed: {shorten(why)}; repeat the command") from error
