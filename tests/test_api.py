"""The Python interface: a run from a dict or a file to its tables, figures and routed prompts, in this process."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator
from importlib.metadata import version
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import persyn
from persyn import Progress
from persyn.analysis import plan, summary, watch
from persyn.db.catalog import Run
from persyn.db.connect import Database
from persyn.db.results import Score
from tests.factories import make_assignment, make_response, make_run

ROOT = Path(__file__).parents[1]
#: What the fake template has: prompts, those of the grid, those of them in the hold-out, teachers.
PROMPTS, GRID, HOLDOUT, TEACHERS = 40, 16, 4, 2


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `persyn init --template fake` writes."""
    folder = tmp_path_factory.mktemp("api")
    templates = files("persyn.cli") / "templates"
    (folder / "run.toml").write_bytes((templates / "fake.toml").read_bytes())
    (folder / "prompts.jsonl").write_bytes((templates / "prompts.jsonl").read_bytes())
    return folder


@pytest.fixture(scope="module")
def store(run_folder: Path) -> Iterator[persyn.Store]:
    with persyn.open(run_folder / "store.db", home=run_folder / "home") as found:
        yield found


@pytest.fixture(scope="module")
def worked(store: persyn.Store, run_folder: Path) -> tuple[persyn.Run, list[tuple[str, Progress, threading.Thread]]]:
    """The fake template, worked here, and what was said of its progress."""
    said: list[tuple[str, Progress, threading.Thread]] = []

    def count(stage: str, counts: Progress) -> None:
        said.append((stage, counts, threading.current_thread()))

    return store.start(run_folder / "run.toml").work(count), said


@pytest.fixture(scope="module")
def run(worked: tuple[persyn.Run, object]) -> persyn.Run:
    return worked[0]


def config(folder: Path, **table: object) -> dict[str, Any]:
    """The run file as a dict."""
    given = tomllib.loads((folder / "run.toml").read_text())
    given["prompts"]["file"] = folder / "prompts.jsonl"
    given["run"] |= table
    return given


def test_importing_persyn_loads_no_library() -> None:
    code = (
        "import sys, persyn; heavy = ('sqlalchemy', 'numpy', 'pyarrow', 'torch');"
        "print([m for m in heavy if m in sys.modules]); persyn.open;"
        "print([m for m in ('torch', 'matplotlib', 'click', 'celery', 'starlette') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "[]"]


def test_the_package_is_typed_and_offers_what_it_lists() -> None:
    assert (files("persyn") / "py.typed").is_file()
    assert persyn.__version__ == version("persyn")
    assert all(hasattr(persyn, name) for name in persyn.__all__)
    assert set(dir(persyn)) == set(persyn.__all__)
    offered = {name: getattr(persyn, name) for name in persyn.__all__}
    assert [name for name, kind in offered.items() if isinstance(kind, type) and kind.__name__ != name] == []
    with pytest.raises(AttributeError, match="no attribute 'opens'"):
        persyn.opens  # noqa: B018


def test_a_run_is_worked_and_counts_every_row_on_the_way(
    worked: tuple[persyn.Run, list[tuple[str, Progress, threading.Thread]]],
) -> None:
    run, said = worked
    assert run.state == "done"
    assert {thread for _, _, thread in said} == {threading.current_thread()}
    counted = {stage: counts for stage, counts, _ in said}
    assert counted == {stage: counts for stage, counts in run.progress().items() if stage in counted}
    assert counted["calibrate"].total == GRID * TEACHERS
    assert counted["generate"].total == PROMPTS


def test_a_dict_and_a_file_are_the_same_run(store: persyn.Store, run: persyn.Run, run_folder: Path) -> None:
    assert store.start(config(run_folder)) == run
    assert store.run("fake") == run
    assert run in store.runs()
    assert run.config["run"]["alpha"] == 0.4


def test_a_run_that_is_done_is_found_done(run: persyn.Run) -> None:
    before = run.responses()
    assert run.resume().work().state == "done"
    assert run.responses() == before
    assert [seen.state for seen in run.watch()] == ["done"]
    with pytest.raises(persyn.UsageError, match="fake is done already"):
        run.cancel()


def test_an_error_of_the_callback_stops_the_work_and_a_cancelled_run_says_so(
    store: persyn.Store, run_folder: Path
) -> None:
    started = store.start(config(run_folder, name="stopped", seed=2))

    def stop(stage: str, counts: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        started.work(stop)
    assert started.state == "running"
    assert next(started.watch()).held == []
    with pytest.raises(
        persyn.UsageError, match=r"no router yet: it is running in stage calibrate; call work\(\) first"
    ):
        started.route(["What is 2 plus 2?"])
    started.cancel()
    with pytest.raises(persyn.PersynError, match="was cancelled"):
        started.work()
    with pytest.raises(persyn.UsageError, match=r"is cancelled in .*; call resume\(\) and work\(\) first"):
        started.route("What is 2 plus 2?")


def test_tables_have_a_row_for_everything_the_run_has(run: persyn.Run) -> None:
    prompts = run.prompts()
    assert prompts.num_rows == PROMPTS
    roles = prompts.column("role").to_pylist()
    assert [roles.count(role) for role in ("calibration", "holdout", "target")] == [
        GRID - HOLDOUT,
        HOLDOUT,
        PROMPTS - GRID,
    ]
    assert all(isinstance(json.loads(meta), dict) for meta in prompts.column("meta").to_pylist())

    # All teachers answer the grid, one teacher each other prompt.
    responses = run.responses()
    assert responses.num_rows == GRID * TEACHERS + (PROMPTS - GRID)
    failed = responses.column("failure").drop_null().to_pylist()
    assert all(failure.startswith("refused") for failure in failed)
    assert responses.column("text").null_count == len(failed)

    assignments = run.assignments()
    assert assignments.column("prompt_id") == prompts.column("prompt_id")
    assert set(assignments.column("teacher").to_pylist()) <= {"ada", "bob"}

    # Each response of the grid that has a text has two scores.
    in_grid = [role != "target" for role in roles]
    of_grid = set(prompts.filter(pa.array(in_grid)).column("prompt_id").to_pylist())
    answered = [row["response_id"] for row in responses.to_pylist() if row["text"] and row["prompt_id"] in of_grid]
    scored = [row["response_id"] for row in run.scores().to_pylist() if row["prompt_id"] in of_grid]
    assert scored == [response_id for response_id in answered for _ in range(2)]


def test_rewards_of_the_grid_are_those_of_its_scores(run: persyn.Run) -> None:
    table = run.rewards()
    assert table.num_rows == GRID * TEACHERS
    assert sum(table.column("is_holdout").to_pylist()) == HOLDOUT * TEACHERS
    values = {
        (row["prompt_id"], row["teacher"], row["measure"]): row["value"] / (row["n_tokens"] or 1)
        if row["measure"] == "learnability"
        else row["value"]
        for row in run.scores().to_pylist()
    }
    for row in table.to_pylist():
        assert row["quality"] == values.get((row["prompt_id"], row["teacher"], "quality"))
        assert row["learnability"] == values.get((row["prompt_id"], row["teacher"], "learnability"))
    # With two teachers and min-max, one has 1 and the other 0 of each measure, or both 0 where one is missing.
    assert set(run.rewards(0.25).column("reward").drop_null().to_pylist()) <= {0.0, 0.25, 0.75, 1.0}
    with pytest.raises(persyn.UsageError, match=r"alpha must be within \[0, 1\], got 2"):
        run.rewards(2)


def test_the_rewards_of_one_prompt_worked_out_by_hand(database: Database, database_url: str, tmp_path: Path) -> None:
    with database.write() as session:
        made = make_run(session, teachers=("a", "b", "c"), prompts=2, calibration=1)
        row = session.get_one(Run, made.id)
        # Quality 1, 3 and 2; log-likelihoods of -8, -2 and -6 nats over 4, 4 and 2 tokens.
        for teacher_id, quality, nats, tokens in zip(made.teacher_ids, (1, 3, 2), (-8, -2, -6), (4, 4, 2), strict=True):
            response_id = make_response(session, made.prompt_ids[0], teacher_id)
            for scorer_id, value, n_tokens in (
                (row.quality_scorer_id, quality, None),
                (row.learnability_scorer_id, nats, tokens),
            ):
                score = {"response_id": response_id, "scorer_id": scorer_id, "detail": {}}
                session.add(Score(**score, value=float(value), n_tokens=n_tokens))
        make_assignment(session, made.id, made.prompt_ids[1], made.teacher_ids[2], margin=0.5)
        make_response(session, made.prompt_ids[1], made.teacher_ids[2], text="No.")
        make_response(session, made.prompt_ids[1], made.teacher_ids[0], text="Written for another run.")
    with persyn.open(database_url, home=tmp_path) as store:
        found = store.run("run")
        assert found.prompts().column("role").to_pylist() == ["calibration", "target"]
        assert found.prompts().column("meta").to_pylist() == ["{}", "{}"]
        assert found.responses().column("text").to_pylist() == ["Yes.", "Yes.", "Yes.", "No."]
        assert found.responses().column("teacher").to_pylist() == ["a", "b", "c", "c"]
        assert found.assignments().select(["teacher", "score", "margin", "reason"]).to_pylist() == [
            {"teacher": "c", "score": None, "margin": 0.5, "reason": "router"}
        ]
        assert found.scores().column("measure").to_pylist() == ["quality", "learnability"] * 3
        assert found.scores().column("value").to_pylist() == [1.0, -8.0, 3.0, -2.0, 2.0, -6.0]
        table = found.rewards()
        assert table.column("teacher").to_pylist() == ["a", "b", "c"]
        assert table.column("learnability").to_pylist() == [-2.0, -0.5, -3.0]
        # Min-max: quality 0, 1 and 0.5; learnability (-2 + 3) / 2.5 = 0.4, 1 and 0; alpha 0.4.
        assert table.column("reward").to_pylist() == pytest.approx([0.4 * 0.4, 1.0, 0.6 * 0.5])
        assert found.rewards(0.0).column("reward").to_pylist() == [0.0, 1.0, 0.5]
        # By rank, learnability is 0.5, 1 and 0.
        assert found.rewards(1.0, normalise="rank").column("reward").to_pylist() == [0.5, 1.0, 0.0]
        # Not a token but the whole response: -8, -2 and -6.
        whole = found.rewards(1.0, per="response").column("reward").to_pylist()
        assert whole == pytest.approx([0.0, 1.0, 1 / 3])


def test_strategies_are_compared_in_a_table(run: persyn.Run) -> None:
    table = run.comparison(0.0)
    strategies = table.column("strategy").to_pylist()
    assert strategies[0] == "oracle"
    assert {"persyn", "static", "random"} <= set(strategies)
    rewards = table.column("reward").to_pylist()
    assert rewards == sorted(rewards, reverse=True)
    assert all(sum(shares.values()) == pytest.approx(1) for shares in table.column("shares").to_pylist())
    told = json.loads(table.schema.metadata[b"persyn"])
    # One of the hold-out prompts has a single response, and so no reward.
    assert (told["run"], told["alpha"], told["n_holdout"]) == ("fake", 0.0, HOLDOUT - 1)


def test_the_dataset_is_what_the_export_writes(run: persyn.Run, tmp_path: Path) -> None:
    from pyarrow import parquet

    with pytest.warns(UserWarning, match="no licence is stated for ada, bob: check how their") as caught:
        manifest = run.export(tmp_path / "dataset")
    assert caught[0].filename == __file__
    assert (manifest.folder / "manifest.json").is_file()
    assert f"{manifest.exported} of {PROMPTS} rows in {tmp_path / 'dataset'}" in repr(manifest)
    table = run.dataset()
    assert table.num_rows == manifest.exported
    assert table == parquet.read_table(next((tmp_path / "dataset").glob("*.parquet")))
    capped = run.dataset(persyn.ExportOptions(cap=3, splits={"test": 0.5}))
    assert capped.num_rows == 3 * TEACHERS
    assert set(capped.column("split").to_pylist()) <= {"train", "test"}


def test_the_dataset_is_a_hugging_face_dataset(run: persyn.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    found = run.to_dataset()
    assert isinstance(found, datasets.Dataset)
    assert len(found) == run.dataset().num_rows
    assert found[0]["messages"][-1]["role"] == "assistant"
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(persyn.UsageError, match="pip install datasets"):
        run.to_dataset()


def test_figures_show_themselves(run: persyn.Run, tmp_path: Path) -> None:
    figure = run.figure("teacher-shares")
    assert figure._repr_svg_().startswith("<svg")
    assert "ada" in figure.description
    figure.save(tmp_path / "shares.svg")
    figure.save(tmp_path / "shares.png")
    assert (tmp_path / "shares.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "shares.svg").read_text() == figure.svg()
    with pytest.raises(persyn.UsageError, match=r"in \.svg or \.png, got \.pdf"):
        figure.save("shares.pdf")
    with pytest.raises(persyn.UsageError, match=r"no figure 'shares'; available: teacher-shares"):
        run.figure("shares")


def test_new_prompts_are_routed(run: persyn.Run) -> None:
    conversation = [
        {"role": "user", "content": "What is 2 plus 2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "And 3 more?"},
    ]
    table = run.route(["Name a prime number.", conversation])
    assert table.column("prompt").to_pylist() == ["Name a prime number.", "And 3 more?"]
    for row in table.to_pylist():
        assert set(row["scores"]) == {"ada", "bob"}
        assert row["teacher"] == max(row["scores"], key=row["scores"].__getitem__)
        assert row["margin"] == pytest.approx(abs(row["scores"]["ada"] - row["scores"]["bob"]))
    # A prompt of the run gets the same teacher as in the run.
    routed = next(row for row in run.assignments().to_pylist() if row["reason"] == "router: fake")
    texts = {row["prompt_id"]: row["text"] for row in run.prompts().to_pylist()}
    assert run.route(texts[routed["prompt_id"]]).column("teacher").to_pylist() == [routed["teacher"]]
    assert run.route([]).num_rows == 0
    assert run.route(conversation) == run.route([conversation])
    for prompts, why in (
        ([conversation[:2]], "must end with the user's turn"),
        (["Hi", " "], r"'prompts\[1\]' is empty"),
        (["Hi", None], r"'prompts\[1\]' must be a text or a list of turns, got None"),
        ([["Hi"]], r"'prompts\[0\]': turn 1 must have a role and a content, got 'Hi'"),
        (conversation[0], "prompts must be a list of texts or conversations, got {'role'"),
    ):
        with pytest.raises(persyn.UsageError, match=why):
            run.route(prompts)  # type: ignore[arg-type]


def test_a_run_without_a_router_routes_none_and_failed_rows_are_a_warning(
    store: persyn.Store, run_folder: Path
) -> None:
    given = config(run_folder, name="random") | {"strategy": {"kind": "random"}}
    teachers = [
        {"name": name, "model": name, "engine": "fake", "gpus": 0, "options": {"fail_every": 2}} for name in "ab"
    ]
    started = store.start(given | {"teachers": teachers})
    with pytest.raises(persyn.UsageError, match="strategy random, which does not read prompts"):
        started.route(["What is 2 plus 2?"])
    with pytest.warns(UserWarning, match=r"generate: \d+ of 40 rows failed .* retry\(\['refused'\]\)") as caught:
        started.work()
    assert caught[0].filename == __file__
    failed = started.progress()["generate"].failed
    assert started.retry(["refused"]).state == "running"
    assert started.progress()["generate"].pending == failed
    started.cancel()


def test_a_warning_reaches_code_that_exec_runs_without_a_module_name(run: persyn.Run, tmp_path: Path) -> None:
    code = compile("run.export(folder)", "cell", "exec")
    with pytest.warns(UserWarning, match="no licence is stated for ada, bob") as caught:
        exec(code, {"run": run, "folder": tmp_path / "data"})
    assert caught[0].filename == "cell"


def test_a_plan_stores_nothing(store: persyn.Store, run: persyn.Run, run_folder: Path) -> None:
    before = store.runs()
    plan = store.plan(config(run_folder, name="planned", seed=7))
    assert (plan.prompts, plan.calibration, plan.state) == (PROMPTS, GRID, None)
    assert store.plan(run_folder / "run.toml").state == "done"
    assert store.runs() == before


def test_a_notebook_shows_a_run_its_plan_and_its_summary_as_tables(
    store: persyn.Store, run: persyn.Run, run_folder: Path
) -> None:
    counts = run.progress()["calibrate"]
    assert repr(counts) == f"Progress(total=32, done={counts.done}, failed={counts.failed}, pending=0)"
    shown = run._repr_html_().splitlines()
    assert shown[0] == "<pre>run fake: done"
    assert shown[2].split() == ["stage", "rows", "done", "failed", "pending"]
    assert shown[3].split() == ["calibrate", "32", str(counts.done), str(counts.failed), "0"]

    lines = [line.split() for line in repr(run.summary()).splitlines()]
    assert ["run", "fake:", "done,", "40", "prompts"] in lines
    assert [line[0] for line in lines if line][-3:] == ["teacher", "ada", "bob"]

    lines = [line.split() for line in repr(store.plan(config(run_folder, name="shown", seed=7))).splitlines()]
    assert ["stage", "teacher", "prompts", "stored", "requests", "tokens", "in", "tokens", "out"] in [
        line[:9] for line in lines
    ]
    assert ["undecided", "ada", "24"] in [line[:3] for line in lines]
    assert ["at", "an", "even", "split"] in [line[:4] for line in lines]
    assert repr(store.plan(run_folder / "run.toml")).splitlines()[-2].startswith("this run ")


def test_a_run_is_worked_in_a_thread_and_watched(store: persyn.Store, run: persyn.Run, run_folder: Path) -> None:
    started = store.start(config(run_folder, name="watched", alpha=0.6))
    assert started._repr_html_().startswith("<pre>run watched: running; no worker holds a job of it\n")
    with pytest.warns(UserWarning, match=r"no worker holds a job of run watched; call work\(\) in another") as caught:
        seen = next(seen for seen in islice(started.watch(0.2), 100) if caught)
    assert seen.is_idle
    assert caught[0].filename == __file__
    worker = threading.Thread(target=started.work)
    worker.start()
    assert [seen.state for seen in started.watch(0.1)][-1] == "done"
    worker.join()


def test_an_argument_of_another_type_is_named(store: persyn.Store, run: persyn.Run) -> None:
    options = persyn.ExportOptions
    calls: dict[str, Callable[[], object]] = {
        "options must be a persyn.ExportOptions, such as": lambda: run.export("out", {"cap": 3}),  # type: ignore[arg-type]
        "splits must be a dict of names and shares": lambda: options(splits="test=0.2"),  # type: ignore[arg-type]
        "finish_reasons must be a list of texts, such as ['stop'], got 'stop'": lambda: options(finish_reasons="stop"),  # type: ignore[arg-type]
        "cap must be a whole number, got '3'": lambda: options(cap="3"),  # type: ignore[arg-type]
        "unscored must be 'keep' or 'drop', got 'kept'": lambda: options(min_quality=1, unscored="kept"),  # type: ignore[arg-type]
        "reasons must be a list of texts, such as ['refused'], got 'refused'": lambda: run.retry("refused"),
        "alpha must be a number within [0, 1], got '0.5'": lambda: run.rewards(alpha="0.5"),  # type: ignore[arg-type]
        "alpha must be a number within [0, 1], got []": lambda: run.comparison(alpha=[]),  # type: ignore[arg-type]
        "config must be the path of a run file, or a dict": lambda: store.start(None),  # type: ignore[arg-type]
    }
    for said, call in calls.items():
        with pytest.raises(persyn.UsageError) as caught:
            call()
        assert str(caught.value).startswith(said)


def test_options_of_an_export_may_be_lists_paths_and_numpy_numbers() -> None:
    given: dict[str, Any] = {"finish_reasons": ["stop"], "benchmarks": [Path("a.txt")], "cap": np.int64(3)}
    given |= {"min_quality": np.float32(0.5), "splits": {"test": np.float64(0.25)}}
    plain: dict[str, Any] = {"finish_reasons": ("stop",), "benchmarks": ("a.txt",), "cap": 3}
    assert persyn.ExportOptions(**given) == persyn.ExportOptions(min_quality=0.5, splits={"test": 0.25}, **plain)


def test_a_mistake_shows_one_traceback_without_options_of_the_command_line(
    store: persyn.Store, run: persyn.Run, run_folder: Path
) -> None:
    (run_folder / "text.db").write_text("not a database" * 100)
    questions = config(run_folder, name="questions")
    questions["prompts"]["file"] = run_folder / "questions.json"
    questions["prompts"]["file"].write_text("[1]")
    calls: list[tuple[str, Callable[[], object]]] = [
        ("file is not a database; check its address", lambda: persyn.open(run_folder / "text.db")),
        ("invalid database URL", lambda: persyn.open("nonsense://")),
        ("unknown key 'alhpa'", lambda: store.plan(config(run_folder, alhpa=0.3))),
        ("cannot be imported", lambda: store.start(questions)),
        ("resume the existing run", lambda: store.start(config(run_folder, alpha=0.3))),
        ("set unscored to 'keep' or 'drop'", lambda: run.dataset(persyn.ExportOptions(min_quality=0.5))),
        ("set a minimum quality instead", lambda: run.export(options=persyn.ExportOptions(drop_wrong=True))),
        ("has a field 'nosuch' in its metadata; fields: group", lambda: run.figures(group_by="nosuch")),
        ("the router curve: computed only by 'persyn report", lambda: run.figure("nosuch")),
    ]
    for said, call in calls:
        with pytest.raises(persyn.UsageError) as caught:
            call()
        assert said in str(caught.value)
        assert not re.search(r"(?<!persyn report fake )--", str(caught.value))
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_errors_say_what_there_is(store: persyn.Store, run: persyn.Run, run_folder: Path) -> None:
    with pytest.raises(persyn.UsageError, match=r"no run named 'fakes' in the store .*fake"):
        store.run("fakes")
    with pytest.raises(persyn.UsageError, match=r"the configuration: unknown key 'alhpa' in \[run\]; .*'alpha'"):
        store.start(config(run_folder, alhpa=0.3))
    with pytest.raises(persyn.UsageError, match=r"the configuration: expected text"):
        store.start(config(run_folder, alpha=object()))
    with pytest.raises(persyn.UsageError, match="exists with another configuration"):
        store.start(config(run_folder, alpha=0.3))
    with pytest.raises(persyn.UsageError, match="cannot read the run file"):
        store.start(run_folder / "absent.toml")


def test_the_page_and_the_readme_show_lines_that_run(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("datasets")
    pytest.importorskip("pandas")
    fence, code = re.findall(r"(```python\n(.*?)```\n)", (ROOT / "docs/python.md").read_text(), re.DOTALL)[0]
    assert fence in (ROOT / "README.md").read_text()
    for name in ("run.toml", "prompts.jsonl"):
        (tmp_path / name).write_bytes((run_folder / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    for name in ("PERSYN_HOME", "PERSYN_DATABASE_URL", "PERSYN_BROKER_URL"):
        monkeypatch.delenv(name, raising=False)
    shown: dict[str, Any] = {}
    exec(code, shown)
    assert len(shown["rewards"]) == GRID * TEACHERS
    assert shown["routed"].num_rows == 2
    assert "Name a prime number above 90." in capsys.readouterr().out
    assert (tmp_path / "strategies.svg").is_file()


def test_the_page_explains_every_name_and_every_column(run: persyn.Run) -> None:
    page = re.sub(r"```.*?```", "", (ROOT / "docs/python.md").read_text(), flags=re.DOTALL)
    explained = set(re.findall(r"[a-z_]+", " ".join(re.findall(r"`([^`]+)`", page))))
    offered = {name for kind in (persyn.Store, persyn.Run, persyn.Figure) for name in vars(kind) if name[0] != "_"}
    assert offered <= explained
    tables = run.prompts(), run.responses(), run.scores(), run.rewards(), run.assignments(), run.comparison()
    columns = {re.sub("_(low|high)$", "", name) for table in tables for name in table.column_names}
    assert columns <= explained
    structs: tuple[Any, ...] = (plan.Plan, plan.Share, plan.Amount, summary.Summary, summary.StageFacts)
    structs += (summary.TeacherFacts, summary.WorkerFacts, persyn.ExportOptions)
    structs += (watch.Snapshot, watch.HeldJob, watch.TeacherRate, watch.JobErrors, watch.ServerWait)
    assert {name for kind in structs for name in kind.__struct_fields__} <= explained
