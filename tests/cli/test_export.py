"""`persyn export`: its output, and the repository on the hub afterwards."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from huggingface_hub import constants
from sqlalchemy import update

from persyn.cli.main import persyn as persyn_command
from persyn.db.catalog import Run, RunState
from persyn.db.connect import Database
from persyn.db.results import Response
from persyn.errors import PersynError, UsageError
from tests.cli.conftest import Persyn
from tests.factories import make_assignment, make_response, make_run
from tests.hub_server import TOKEN, Hub, Repo

# The hub's client uploads large files in a way that its HTTP library deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

Export = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path) -> None:
    """A run named "run" with twenty answered prompts and a failed one."""
    (tmp_path / "home").mkdir()
    store = Database(f"sqlite:///{tmp_path / 'home' / 'persyn.db'}")
    store.upgrade()
    with store.write() as session:
        made = make_run(session, prompts=21)
        for number, prompt_id in enumerate(made.prompt_ids):
            make_assignment(session, made.id, prompt_id, made.teacher_ids[0])
            answer = {"text": None, "failure": "refused"} if number == 20 else {"text": f"Answer {number}."}
            make_response(session, prompt_id, made.teacher_ids[0], **answer)
    store.close()


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub.running() as server:
        yield server


@pytest.fixture
def export(run: None, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Export:
    """Run `persyn export run` in this process, for speed; return its output, or raise its error.

    huggingface_hub reads its environment once at import, so its constants are patched here.
    """
    for name, value in {"PERSYN_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}.items():
        monkeypatch.setenv(name, value)
    settings = {"ENDPOINT": hub.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
    settings["HUGGINGFACE_CO_URL_TEMPLATE"] = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    settings |= {"HF_HUB_CACHE": str(tmp_path / "hf"), "HF_TOKEN_PATH": str(tmp_path / "no-token")}
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)

    def export(*arguments: str) -> str:
        done = CliRunner().invoke(persyn_command, ["export", "run", *arguments])
        if done.exception is not None:
            raise done.exception
        return done.output

    return export


def folder(tmp_path: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (tmp_path / "home" / "datasets" / "run").iterdir()}


def contents(repo: Repo) -> dict[str, bytes]:
    return {path: data for path, data in repo.files.items() if path != ".gitattributes"}


def test_it_says_what_became_of_every_assignment(export: Export, tmp_path: Path) -> None:
    assert "\n7 rows would be in " in export("--dry-run", "--cap", "7")
    assert not (tmp_path / "home" / "datasets").exists()

    said = export("--cap", "7", "--split", "test=0.5")

    assert [line.split() for line in said.splitlines()[:5]] == [
        ["assignments", "rows"],
        ["assigned", "21"],
        ["failed:", "refused", "1"],
        ["dropped:", "cap", "13"],
        ["exported", "7"],
    ]
    assert "warning: no licence is stated for a" in said
    assert json.loads(folder(tmp_path)["manifest.json"])["export"]["cap"] == 7


def test_it_warns_of_responses_that_cannot_be_told_from_reasoning(export: Export, tmp_path: Path) -> None:
    with Database(f"sqlite:///{tmp_path / 'home' / 'persyn.db'}").write() as session:
        session.execute(update(Response).where(Response.text == "Answer 3.").values(reasoning="3", text="</think> 3"))

    assert "contain <think>" not in export("--reasoning", "drop")
    assert "warning: 1 of 20 responses contain <think> or </think> themselves" in export("--reasoning", "inline")
    assert json.loads(folder(tmp_path)["manifest.json"])["export"]["reasoning"] == "inline"
    assert "persyn export run --reasoning inline\n" in folder(tmp_path)["README.md"].decode()


def test_a_run_that_is_resumed_writes_its_dataset_as_it_was_exported_last(export: Export, tmp_path: Path) -> None:
    with Database(f"sqlite:///{tmp_path / 'home' / 'persyn.db'}").write() as session:
        session.execute(update(Run).values(state=RunState.FAILED, stage="calibrate"))
    assert CliRunner().invoke(persyn_command, ["run", "resume", "run"]).exit_code == 0
    export("--cap", "7", "--format", "alpaca")
    before = folder(tmp_path)
    shutil.rmtree(tmp_path / "home" / "datasets" / "run")

    again = CliRunner().invoke(persyn_command, ["run", "resume", "run"])
    assert again.exit_code == 0
    assert set(folder(tmp_path)) > {"messages.jsonl", "alpaca.jsonl"}  # there was no earlier export whose options apply
    export("--cap", "7", "--format", "alpaca")
    CliRunner().invoke(persyn_command, ["run", "resume", "run"])

    assert folder(tmp_path) == before


def test_what_was_left_out_does_not_come_back_where_nobody_can_tell(export: Export, tmp_path: Path) -> None:
    export("--cap", "7")
    manifest = tmp_path / "home" / "datasets" / "run" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"cap"', '"cap_of_tomorrow"'))
    before = folder(tmp_path)

    again = CliRunner().invoke(persyn_command, ["run", "resume", "run"])

    assert isinstance(again.exception, UsageError)
    assert "manifest.json does not say how the dataset was exported (Object contains unknown field" in str(
        again.exception
    )
    assert folder(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--split", "test"), "--split takes NAME=SHARE, such as test=0.05; got 'test'"),
        (("--split", "test=0.1", "--split", "test=0.2"), "given twice"),
        (("--decontaminate", "no.jsonl"), "there is no file"),
        (("--public",), "--public requires --push"),
        (("--push", "nobody"), "'nobody' is not a valid repository name; give OWNER/NAME"),
        (("--push", "me/a b"), "'me/a b' is not a valid repository name; give OWNER/NAME"),
        (("--push", "me/data", "--dry-run"), "give only one of the two"),
    ],
)
def test_what_makes_no_sense_writes_nothing(
    export: Export, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        export(*arguments)

    assert not (tmp_path / "home" / "datasets").exists()


def test_a_push_goes_where_the_environment_says(run: None, persyn: Persyn, hub: Hub, tmp_path: Path) -> None:
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "0",
        # Xet needs its own server; only the older protocol is served here.
        "HF_HUB_DISABLE_XET": "1",
    }

    done = persyn("export", "run", "--push", "me/data", **environment)

    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, f"pushed to {hub.url}/datasets/me/data (private)")
    assert contents(hub.repos["me/data"]) == folder(tmp_path)
    assert TOKEN not in done.stdout + done.stderr


def test_a_push_makes_the_repository_the_folder(export: Export, hub: Hub, tmp_path: Path) -> None:
    assert f"pushed to {hub.url}/datasets/me/data (private)" in export("--push", "me/data", "--split", "test=0.5")
    repo = hub.repos["me/data"]
    assert repo.private
    assert contents(repo) == folder(tmp_path)
    assert repo.commits == ["initial commit", "Run run: 20 rows"]

    assert "unchanged: " in export("--push", "me/data", "--split", "test=0.5")
    assert len(repo.commits) == 2

    repo.files["LICENSE"] = b"mine"
    export("--push", "me/data", "--format", "messages", "--cap", "5")
    assert repo.commits[2:] == ["Run run: 5 rows"]
    assert repo.files.pop("LICENSE") == b"mine"
    assert contents(repo) == folder(tmp_path)
    assert set(folder(tmp_path)) == {
        "README.md",
        "dataset_info.json",
        "dropped.jsonl",
        "manifest.json",
        "messages.jsonl",
    }


def test_a_push_that_broke_off_goes_on(export: Export, hub: Hub, tmp_path: Path) -> None:
    hub.fails = True
    with pytest.raises(PersynError, match=r"dataset.parquet.*repeat the command"):
        export("--push", "me/data")
    assert len(hub.repos["me/data"].commits) == 1
    assert "dataset.parquet" in folder(tmp_path)  # it is written despite the failed push

    hub.fails = False
    export("--push", "me/data")
    assert hub.repos["me/data"].files["dataset.parquet"] == folder(tmp_path)["dataset.parquet"]


def test_what_was_private_is_not_made_public_nor_the_other_way(export: Export, hub: Hub) -> None:
    assert "(public)" in export("--push", "me/open", "--public")
    with pytest.raises(UsageError, match="is public; give --public"):
        export("--push", "me/open")
    export("--push", "me/closed")
    assert "(private)" in export("--push", "me/closed", "--public")

    assert (hub.repos["me/open"].private, hub.repos["me/closed"].private) == (False, True)


@pytest.mark.parametrize("there", [{"README.md": b"# My thesis"}, {"manifest.json": b'{"kind": "other", "files": []}'}])
def test_a_repository_of_something_else_stays_as_it_is(export: Export, hub: Hub, there: dict[str, bytes]) -> None:
    hub.repos["me/data"] = Repo(private=True, files=dict(there))

    with pytest.raises(UsageError, match=f"contains '{next(iter(there))}', which is not part of a PerSyn dataset"):
        export("--push", "me/data")

    assert hub.repos["me/data"].files == there


def test_without_a_token_that_may_write_nothing_is_pushed(
    export: Export, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(UsageError, match="set HF_TOKEN, or log in"):
        export("--push", "me/data")
    assert not (tmp_path / "home" / "datasets").exists()

    monkeypatch.setenv("HF_TOKEN", "hf_of_another")
    with pytest.raises(UsageError, match=r"HTTP 401.*Invalid username") as refused:
        export("--push", "me/data")
    assert "hf_of_another" not in str(refused.value)
    assert hub.repos == {}


def test_a_hub_that_is_not_to_be_reached_is_said_to_be_so(
    export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(PersynError, match=r"cannot be reached.*repeat the command"):
        export("--push", "me/data")
    assert "manifest.json" in folder(tmp_path)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE is set"):
        export("--push", "me/data")
