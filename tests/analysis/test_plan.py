"""Estimates of a run's costs agree with figures computed by hand, and nothing is stored."""

from __future__ import annotations

import json
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs
from sqlalchemy import func, select

from persyn import config
from persyn.analysis import plan, planned_scores
from persyn.analysis.plan import Plan, Share
from persyn.db import Base
from persyn.db.catalog import Prompt, Role, Run, RunPrompt, RunTeacher, Teacher
from persyn.db.connect import Database, scratch
from persyn.db.results import Assignment, Origin, Score
from persyn.db.text import json_characters
from persyn.db.work import Event, Load
from persyn.errors import UsageError
from persyn.ingest import prompt_import
from persyn.runs import pipeline, run_file, start
from tests.factories import make_job, make_prompt, make_response
from tests.foreign import write_module

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
#: Eight characters each, and so is ada's system turn.
TEXTS = [f"prompt {n}" for n in range(10)]
ADA = {"name": "ada", "system": "Be kind.", "sampling": {"max_tokens": 100}, "price_in": 1.0, "price_out": 10.0}
BOB = {"name": "bob", "sampling": {"max_tokens": 50}, "price_in": 2.0, "price_out": 10.0}


def read(
    folder: Path,
    *,
    name: str = "run",
    strategy: str = "persyn",
    function: str = "",
    teachers: tuple[dict[str, Any], ...] = (ADA, BOB),
    quality: dict[str, Any] | list[dict[str, Any]] | None = None,
    generation: dict[str, Any] | None = None,
    **prompts: Any,
) -> config.RunConfig:
    """Read a run file of the ten prompts, four of them for calibration."""
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    common = {"model": "m", "engine": "fake", "gpus": 0}
    tables = {
        "run": {"name": name, "setting": "instruct", "calibration": 4, "holdout": 0.25},
        "prompts": prompts or {"file": "prompts.jsonl"},
        "student": {"name": "student", "model": "", "engine": "fake"},
        "quality": quality or {"kind": "fake"},
        "router": {"engine": "fake"},
        "generation": generation or {},
        "strategy": {"kind": strategy, "model": function},
        "teachers": [common | {"params_b": 1 + place} | table for place, table in enumerate(teachers)],
    }
    file = folder / "run.json"
    file.write_text(json.dumps(tables))
    return run_file.read(file)


def planned(database: Database, wanted: config.RunConfig) -> Plan:
    with database.read() as session:
        return plan.of_file(session, wanted, start.identities(wanted))


def started(database: Database, wanted: config.RunConfig) -> int:
    with database.write() as session:
        return pipeline.start_run(session, wanted, actor="me").id


def left(database: Database, run_id: int) -> Plan:
    with database.read() as session:
        return plan.of_run(session, session.get_one(Run, run_id))


def share(found: Plan, stage: str, teacher: str) -> Share:
    (one,) = [each for each in found.shares if (each.stage, each.teacher) == (stage, teacher)]
    return one


def figures(amount: plan.Amount) -> Any:
    """Its figures up to engine hours."""
    return pytest.approx(structs.astuple(amount)[:5])


def counts(database: Database) -> dict[str, int]:
    with database.read() as session:
        return {
            table.name: session.scalars(select(func.count()).select_from(table)).one()
            for table in Base.metadata.sorted_tables
        }


def teacher_ids(database: Database, run_id: int) -> list[int]:
    of_run = select(RunTeacher.teacher_id).where(RunTeacher.run_id == run_id).order_by(RunTeacher.position)
    with database.read() as session:
        return list(session.scalars(of_run))


@pytest.fixture
def lived(database: Database, tmp_path: Path) -> Database:
    """A store in which ada answered four of the prompts in ten seconds of work, and bob failed on one."""
    with database.write() as session:
        run = pipeline.start_run(session, read(tmp_path, name="old", strategy="oracle"), actor="me")
        ada, bob = session.scalars(select(RunTeacher.teacher_id).where(RunTeacher.run_id == run.id)).all()
        prompt_ids = session.scalars(select(Prompt.id).where(Prompt.text.in_(TEXTS[:4])).order_by(Prompt.id)).all()
        job_id = make_job(session, run.id, teacher_id=ada)
        for at, state in ((0, "running"), (25, "done")):
            when = NOON + timedelta(seconds=at)
            session.add(Event(at=when, actor="w", run_id=run.id, job_id=job_id, to_state=state, detail={}))
        session.add(Load(run_id=run.id, job_id=job_id, owner="w", engine="fake 1", seconds=15.0, log="1.log"))
        # 100 response tokens and 32 prompt tokens, for 4 x (8 + 8) characters and 2 turns of 20 in a template.
        made = [
            make_response(session, prompt_id, ada, prompt_tokens=8, response_tokens=tokens, job_id=job_id)
            for prompt_id, tokens in zip(prompt_ids, (10, 20, 30, 40), strict=True)
        ]
        make_response(session, prompt_ids[0], bob, None, failure="refused: no")
        for scorer_id in (run.quality_scorer_id, run.learnability_scorer_id):
            session.add(Score(response_id=made[0], scorer_id=scorer_id, value=-1.0, n_tokens=1, detail={}))
    return database


def test_without_a_past_lengths_are_bounds_and_the_router_leaves_a_range(database: Database, tmp_path: Path) -> None:
    found = planned(database, read(tmp_path))

    assert (found.state, found.prompts, found.calibration, found.undecided) == (None, 10, 4, 6)
    sources = [(each.prompt_tokens_from, each.response_tokens_from) for each in found.teachers]
    assert sources == [("characters", "max_tokens")] * 2
    # Ada reads 16 characters, 4 tokens, in two turns of 5 more, and may write 100; bob reads 2 in one turn, and may
    # write 50. Their dollars are millionths.
    assert figures(share(found, "calibrate", "ada").ask) == (4, 56, 400, 4056e-6, None)
    assert figures(share(found, "calibrate", "bob").ask) == (4, 28, 200, 2056e-6, None)
    assert figures(share(found, "undecided", "ada").ask) == (6, 84, 600, 6084e-6, None)
    assert figures(share(found, "undecided", "bob").ask) == (6, 42, 300, 3084e-6, None)
    assert figures(found.least) == (14, 126, 900, (4056 + 2056 + 3084) * 1e-6, None)
    assert found.even is not None
    assert figures(found.even) == (14, 147, 1050, (4056 + 2056 + 4584) * 1e-6, None)
    assert figures(found.most) == (14, 168, 1200, (4056 + 2056 + 6084) * 1e-6, None)
    assert figures(found.generate_all) == (20, 210, 1500, (10140 + 5140) * 1e-6, None)
    assert (share(found, "calibrate", "ada").scores_stored, share(found, "calibrate", "ada").scores_to_make) == (0, 8)


def scores(found: Plan, stage: str, teacher: str) -> tuple[int, int]:
    one = share(found, stage, teacher)
    return one.scores_stored, one.scores_to_make


def test_scores_of_responses_that_are_checked_are_counted(database: Database, tmp_path: Path) -> None:
    unchecked = planned(database, read(tmp_path))
    assert (scores(unchecked, "undecided", "ada"), planned_scores.besides_grid(unchecked.shares)) == ((0, 0), 0)

    wanted = read(tmp_path, generation={"check": True})
    found = planned(database, wanted)
    # Four prompts for the student and the quality; six others for the quality alone, whoever answers them.
    assert scores(found, "calibrate", "ada") == (0, 8)
    assert scores(found, "undecided", "ada") == scores(found, "undecided", "bob") == (0, 6)
    assert planned_scores.besides_grid(found.shares) == 6
    twice = planned(database, read(tmp_path, generation={"samples": 2, "keep": "best"}))
    # Two samples of six prompts, and the second sample of the four.
    assert scores(twice, "undecided", "ada") == (0, 16)

    run_id = started(database, wanted)
    with database.write() as session:
        run = session.get_one(Run, run_id)
        is_target = RunPrompt.role == Role.TARGET
        ids = session.scalars(select(RunPrompt.prompt_id).where(RunPrompt.run_id == run_id, is_target)).all()
        ada, bob = session.scalars(select(RunTeacher.teacher_id).order_by(RunTeacher.position))
        for place, prompt_id in enumerate(ids):
            teacher_id = ada if place < 4 else bob
            session.add(Assignment(run_id=run_id, prompt_id=prompt_id, teacher_id=teacher_id, reason="test"))
        session.flush()
        scored = make_response(session, ids[0], ada)
        make_response(session, ids[1], ada)
        make_response(session, ids[2], ada, text=None, failure="empty")
        session.add(Score(response_id=scored, scorer_id=run.quality_scorer_id, value=1.0, detail={}))
    found = left(database, run_id)
    # Of ada's four responses, one has its score, one needs none, and two have to be scored; both of bob's.
    assert scores(found, "generate", "ada") == (1, 2)
    assert scores(found, "generate", "bob") == (0, 2)
    assert planned_scores.besides_grid(found.shares) == 4


def test_what_the_store_has_is_not_asked_again_and_tells_lengths_and_speed(lived: Database, tmp_path: Path) -> None:
    found = planned(lived, read(tmp_path, name="new", strategy="oracle"))

    ada, bob = found.teachers
    assert (ada.response_tokens, ada.response_tokens_from) == (25.0, "store")
    assert (ada.tokens_per_character, ada.prompt_tokens_from) == (32 / (4 * 56), "store")
    assert (ada.tokens_per_second, ada.load_seconds) == (10.0, 15.0)
    assert (bob.response_tokens, bob.response_tokens_from, bob.tokens_per_second) == (50.0, "max_tokens", None)

    hers, his = share(found, "calibrate", "ada"), share(found, "calibrate", "bob")
    assert (hers.prompts, hers.stored, his.prompts, his.stored) == (10, 4, 10, 1)
    # Six prompts of 16 characters are 48 tokens; six responses are 150, and ten are written in a second.
    assert figures(hers.ask) == (6, 48, 150, 1548e-6, 15 / 3600)
    assert figures(his.ask) == (9, 63, 450, 4626e-6, None)
    # Two scorers; the failed response needs no scores.
    assert (hers.scores_stored, hers.scores_to_make) == (2, 18)
    assert (his.scores_stored, his.scores_to_make) == (0, 18)
    assert found.undecided == 0
    assert found.least == found.most == found.generate_all
    assert found.least.cost == pytest.approx(6174e-6)
    assert found.least.engine_hours is None  # bob's speed is unknown
    assert found.even is None


def test_hours_count_for_each_gpu_and_not_behind_a_server(lived: Database, tmp_path: Path) -> None:
    server = {"name": "far", "engine": "openai", "options": {"base_url": "http://127.0.0.1:1/v1"}}
    teachers = (ADA | {"gpus": 2}, BOB, server)
    found = planned(lived, read(tmp_path, name="new", strategy="oracle", teachers=teachers))
    hers, his, far = (share(found, "calibrate", name).ask for name in ("ada", "bob", "far"))
    assert hers.engine_hours is not None
    assert hers.gpu_hours == 2 * hers.engine_hours
    assert (his.gpu_hours, far.engine_hours, far.gpu_hours) == (None, None, 0.0)


def test_another_version_of_a_teacher_has_no_past(lived: Database, tmp_path: Path) -> None:
    colder = ADA | {"sampling": {"max_tokens": 100, "temperature": 0.0}}
    found = planned(lived, read(tmp_path, name="new", strategy="oracle", teachers=(colder, BOB)))
    assert share(found, "calibrate", "ada").stored == 0
    assert found.teachers[0].response_tokens_from == "max_tokens"


@pytest.mark.parametrize("strategy", ["persyn", "static", "strong", "mix", "random", "oracle"])
def test_nothing_is_written_and_the_run_once_started_has_the_same_plan(
    lived: Database, tmp_path: Path, strategy: str
) -> None:
    wanted = read(tmp_path, name="new", strategy=strategy)
    before = counts(lived)
    found = planned(lived, wanted)
    assert counts(lived) == before

    run_id = started(lived, wanted)
    assert structs.replace(left(lived, run_id), state=None) == found
    assert left(lived, run_id).state == "running"


def test_a_fixed_strategy_is_planned_as_it_will_be_drawn(database: Database, tmp_path: Path) -> None:
    wanted = read(tmp_path, strategy="mix")
    found = planned(database, wanted)
    run_id = started(database, wanted)
    with database.read() as session:
        drawn = Counter(session.scalars(select(Teacher.name).join(Assignment).where(Assignment.run_id == run_id)))
    assert {each.teacher: each.prompts for each in found.shares if each.stage == "generate"} == drawn
    assert len(drawn) == 2
    assert found.undecided == 0


def test_one_teacher_that_calibration_will_choose_leaves_a_range_and_no_even_split(
    database: Database, tmp_path: Path
) -> None:
    found = planned(database, read(tmp_path, strategy="static"))
    assert found.even is None
    assert (found.least.response_tokens, found.most.response_tokens) == (900, 1200)


def test_a_function_in_the_routers_place_may_share_evenly_too(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = write_module(tmp_path, monkeypatch, "def choose(prompts, known):\n    return [[1, 0] for _ in prompts]\n")
    found = planned(database, read(tmp_path, strategy="python", function=f"{name}:choose"))
    assert found.strategy == f"{name}:choose"
    assert found.even is not None
    assert (found.calibration, found.undecided, found.even.responses) == (4, 6, 14)


def test_a_price_that_is_missing_leaves_the_dollars_unknown(database: Database, tmp_path: Path) -> None:
    free = {key: value for key, value in BOB.items() if key != "price_out"}
    found = planned(database, read(tmp_path, strategy="oracle", teachers=(ADA, free)))
    assert share(found, "calibrate", "ada").ask.cost == pytest.approx(10140e-6)
    assert share(found, "calibrate", "bob").ask.cost is None
    assert found.least.cost is None


def test_what_is_assigned_is_decided_and_what_is_answered_is_stored(database: Database, tmp_path: Path) -> None:
    run_id = started(database, read(tmp_path))
    ada, bob = teacher_ids(database, run_id)
    with database.write() as session:
        targets = session.scalars(
            select(RunPrompt.prompt_id).where(RunPrompt.run_id == run_id, RunPrompt.role == Role.TARGET)
        ).all()
        for prompt_id, teacher_id in zip(targets[:3], (ada, ada, bob), strict=True):
            session.add(Assignment(run_id=run_id, prompt_id=prompt_id, teacher_id=teacher_id, reason="router"))
        session.flush()
        make_response(session, targets[0], ada)
        make_response(session, targets[0], bob)  # not one that the run will request
    found = left(database, run_id)

    assert found.undecided == 3
    by_stage = {(each.stage, each.teacher): (each.prompts, each.stored, each.ask.responses) for each in found.shares}
    assert by_stage == {
        ("calibrate", "ada"): (4, 0, 4),
        ("calibrate", "bob"): (4, 0, 4),
        ("generate", "ada"): (2, 1, 1),
        ("generate", "bob"): (1, 0, 1),
        ("undecided", "ada"): (3, 0, 3),
        ("undecided", "bob"): (3, 0, 3),
        ("all", "ada"): (10, 1, 9),
        ("all", "bob"): (10, 1, 9),
    }


def test_who_was_imported_is_never_asked(database: Database, tmp_path: Path) -> None:
    eve = {"name": "eve", "model": "eve", "engine": "imported", "price_in": 1.0, "price_out": 1.0}
    wanted = read(
        tmp_path,
        strategy="oracle",
        teachers=(ADA, eve),
        quality={"kind": "imported", "model": "right"},
        source="prompts.jsonl",
    )
    with pytest.raises(UsageError, match=r"'eve' was imported"):
        planned(database, wanted)
    with database.write() as session:
        prompt_import.import_prompts(session, [tmp_path / "prompts.jsonl"])
        eve_id = start.versions.teacher(session, wanted.teachers[1], {})
        for prompt_id in session.scalars(select(Prompt.id).order_by(Prompt.id).limit(7)).all():
            make_response(session, prompt_id, eve_id, origin=Origin.IMPORTED)
    with pytest.raises(UsageError, match="no score 'right' was imported"):
        planned(database, wanted)
    with database.write() as session:
        scorer_id = start.versions.quality(session, wanted.quality, {})
        elsewhere = make_response(
            session, make_prompt(session, "Why?", source="other.jsonl"), eve_id, origin=Origin.IMPORTED
        )
        session.add(Score(response_id=elsewhere, scorer_id=scorer_id, value=1.0, detail={}))
    found = planned(database, wanted)

    hers = share(found, "calibrate", "eve")
    assert (hers.prompts, hers.stored, hers.ask.responses, hers.ask.cost) == (10, 7, 0, 0)
    # Learnability only: quality was imported as well.
    assert (hers.scores_to_make, share(found, "calibrate", "ada").scores_to_make) == (7, 10)


def test_prompts_that_were_imported_need_a_store(tmp_path: Path) -> None:
    with scratch() as empty, pytest.raises(UsageError, match="no prompt was imported"):
        planned(empty, read(tmp_path, source="prompts.jsonl"))


@pytest.mark.parametrize("letter", ["x", "é"])  # only SQLite stores the second as six characters
def test_a_long_history_counts_as_read(database: Database, tmp_path: Path, letter: str) -> None:
    wanted = read(tmp_path, strategy="oracle")
    turns = [{"role": "user", "content": letter * 4000}, {"role": "assistant", "content": "y" * 4000}]
    row = {"messages": [*turns, {"role": "user", "content": "Go on."}]}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(row) + "\n")
    tokens = share(planned(database, wanted), "calibrate", "bob").ask.prompt_tokens
    assert 2000 < tokens < 2050


def test_the_texts_and_keys_of_a_value_are_counted_decoded(database: Database) -> None:
    value = [{"role": "é", "calls": [{"n": 1, "is_ü": [True, None, "\u2028\n"]}]}, ["a"]]
    # "role", "é", "calls", "n", "is_ü", two characters, "a".
    with database.write() as session:
        make_prompt(session, "asked", history=value)
        make_prompt(session, "of one turn")
        counted = select(json_characters(Prompt.history)).order_by(Prompt.id)
        assert session.scalars(counted).all() == [4 + 1 + 5 + 1 + 4 + 2 + 1, 0]


def test_a_scratch_store_is_gone_afterwards() -> None:
    with scratch() as database:
        file = Path(str(database.url.database))
        assert file.exists()
    assert not file.parent.exists()
