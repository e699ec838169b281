"""Identify exact model versions: a hub commit or a folder's digest, and the hash of the chat template.

Only reads files; neither loads models nor imports a model library.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import msgspec

from persyn.errors import UsageError, shorten

#: Files up to this size are hashed completely; of larger ones (weights), the size and both ends.
_WHOLE_BYTES = 64 * 2**20
_END_BYTES = 2**20
#: How long to wait for the hub to answer.
_HUB_SECONDS = 5.0
_CONFIGURATION = ("*.json", "*.jinja", "*.model", "*.txt")


@dataclass(frozen=True, slots=True)
class Identity:
    """A model as an immutable version."""

    #: A hub commit, "sha256:..." for a local folder, None for a model that only a server knows.
    revision: str | None
    template_hash: str | None


UNKNOWN_IDENTITY = Identity(None, None)

Identify: TypeAlias = Callable[[str, str | None], Identity]
"""Determines the version of a model, given its folder or hub id and a revision."""


def identify(model: str, revision: str | None = None) -> Identity:
    """Determine a model's version without loading it.

    A local folder is hashed; of a hub model only the small files are fetched, from the cache when offline.
    Raises `UsageError` when there is no such model.
    """
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UsageError(f"{model} is not a model folder: it has no config.json")
        return Identity(f"sha256:{_digest(folder)}", _template_hash(folder))
    if folder.is_file():  # a GGUF, for a server
        return Identity(f"sha256:{_digest_of([folder])}", None)
    if folder.is_absolute() or model.startswith((".", "~")):
        raise UsageError(f"there is no model folder {model}; give an existing folder or a hub id")
    snapshot = _snapshot(model, revision)
    return Identity(snapshot.name, _template_hash(snapshot))


def identify_embedding(model: str, revision: str | None = None) -> Identity:
    """Determine the version of a sentence-embedding model, whose folder has folders of modules, without loading it.

    Raises `UsageError` when there is no such model.
    """
    folder = Path(model)
    if not folder.is_dir():
        return Identity(identify(model, revision).revision, None)
    if not any((folder / name).is_file() for name in ("modules.json", "config.json")):
        raise UsageError(f"{model} is not an embedding model's folder: it has no modules.json or config.json")
    files = (file for file in folder.rglob("*") if file.is_file())
    shown = sorted(file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts))
    return Identity(f"sha256:{_digest_of(shown)}", None)


def identify_adapter(adapter: str, revision: str | None = None) -> Identity:
    """Determine the version of a LoRA adapter without loading it; `UsageError` when there is none."""
    folder = adapter_folder(adapter, revision)
    return Identity(f"sha256:{_digest(folder)}" if Path(adapter).is_dir() else folder.name, None)


def adapter_folder(adapter: str, revision: str | None) -> Path:
    """The folder with an adapter's files, which are fetched from the hub if needed.

    Raises `UsageError` when there is none, or if its weights would have to be unpickled.
    """
    folder = Path(adapter)
    if not folder.is_dir():
        if folder.is_absolute() or adapter.startswith((".", "~")):
            raise UsageError(f"there is no adapter folder {adapter}; give an existing folder or a hub id")
        folder = _snapshot(adapter, revision, what="adapter", patterns=("*.json", "*.safetensors"))
    for file, hint in (
        ("adapter_config.json", "it is not a LoRA adapter"),
        ("adapter_model.safetensors", "save it as safetensors; pickled weights (.bin) can run code and are not loaded"),
    ):
        if not (folder / file).is_file():
            raise UsageError(f"the adapter {adapter} has no {file}: {hint}")
    return folder


def snapshot_in_cache(model: str, revision: str | None) -> Path | None:
    """The folder of a hub model in the local cache; None if it is not there."""
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(model, "config.json", revision=revision)
    except ValueError:  # not a hub id
        return None
    return Path(found).parent if isinstance(found, str) else None


def require_unchanged(model: str, revision: str | None, identified_by: Identify = identify) -> None:
    """Raise `UsageError` when a model is missing or no longer the recorded version.

    revision: as returned by `identified_by`.
    """
    found = identified_by(model, hub_revision(revision)).revision
    if found != revision:
        raise UsageError(f"{model} has changed: it is {found}, and was {revision}; restore it")


def hub_revision(revision: str | None) -> str | None:
    """The revision to request from the hub; None for a local folder's digest."""
    return None if revision is None or revision.startswith("sha256:") else revision


@functools.cache
def hub_silence() -> str:
    """Why the model hub does not answer; empty if it does or is disabled. Checked only once.

    Call it before downloads: the hub's own client retries each file for minutes.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return ""
    try:
        get_session().head(constants.ENDPOINT, timeout=_HUB_SECONDS)
    except Exception as error:  # depends on the client's HTTP library
        # Stop this process, which has already read the variable, and its engines from waiting again.
        constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"
        return f"{constants.ENDPOINT} does not answer: {type(error).__name__}: {shorten(str(error))}"
    return ""


def _snapshot(
    model: str, revision: str | None, *, what: str = "model", patterns: Sequence[str] = _CONFIGURATION
) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    silence = hub_silence()
    try:
        return Path(
            snapshot_download(model, revision=revision, allow_patterns=list(patterns), local_files_only=bool(silence))
        )
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") == "1" else ""
        offline = f" ({silence})" if silence else offline
        at = f" at revision {revision!r}" if revision else ""
        raise UsageError(
            f"there is no {what} {model!r}{at}: no such folder, and not available from the hub{offline}; "
            "give its folder, or correct the id or the connection ('persyn init --template fake' needs no model)"
        ) from error


def _digest(folder: Path) -> str:
    return _digest_of(sorted(f for f in folder.iterdir() if f.is_file() and not f.name.startswith(".")))


def _digest_of(files: Iterable[Path]) -> str:
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.name}:{file.stat().st_size}:".encode())
        for part in _parts(file):
            total.update(part)
    return total.hexdigest()


def _parts(file: Path) -> Iterator[bytes]:
    size = file.stat().st_size
    with file.open("rb") as opened:
        if size <= _WHOLE_BYTES:
            while part := opened.read(2**20):
                yield part
        else:
            yield opened.read(_END_BYTES)
            opened.seek(size - _END_BYTES)
            yield opened.read(_END_BYTES)


def _template_hash(folder: Path) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return hashlib.sha256(file.read_bytes()).hexdigest()
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        template = msgspec.json.decode(settings.read_bytes()).get("chat_template")
        if template:
            return hashlib.sha256(msgspec.json.encode(template)).hexdigest()
    return None
