"""Preference pairs, best responses and routed prompts: exact rows, what is left out, and how libraries read them."""

from __future__ import annotations

import json
import math
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from sqlalchemy.orm import Session

import persyn
from persyn.dataset import card, export
from persyn.dataset.kinds import KINDS
from persyn.dataset.manifest import Manifest
from persyn.dataset.options import ExportOptions
from persyn.db.catalog import Role, Run, RunPrompt, Teacher
from persyn.db.connect import Database
from persyn.db.results import NO_TEXT, Response, RouterScore, Score
from persyn.errors import UsageError
from persyn.method import pairs
from tests.factories import MadeRun, digest, make_assignment, make_prompt, make_response, make_router, make_run
from tests.one_database import SQLITE

TEACHERS = ("a", "b", "c")


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def answered(
    session: Session, run: MadeRun, prompt: int, scores: Sequence[tuple[float, float] | None], **columns: Any
) -> None:
    """Responses of the teachers in head order to a prompt, each with quality and learnability, or not scored."""
    of_run = session.get_one(Run, run.id)
    for teacher_id, name, values in zip(run.teacher_ids, TEACHERS, scores, strict=True):
        response = make_response(session, run.prompt_ids[prompt], teacher_id, f"{name} {prompt}", **columns)
        if values is not None:
            quality, learnability = values
            scored = (of_run.quality_scorer_id, quality, None), (of_run.learnability_scorer_id, learnability, 1)
            session.add_all(
                Score(response_id=response, scorer_id=scorer, value=value, n_tokens=n, detail={})
                for scorer, value, n in scored
            )
    session.flush()


@pytest.fixture
def run(database: Database) -> MadeRun:
    """Four calibration prompts, the last a hold-out, and two targets; alpha 0.4 and minmax, the defaults.

    prompt 0: rewards 1, 0.2 and 0: qualities 1, 0, 0 and learnabilities -1, -2, -3 are 0.6 (1, 0, 0) + 0.4 (1, .5, 0).
    prompt 1: all are equal, so there is no pair.
    prompt 2: one of them is scored, so there is no reward.
    prompt 3: rewards 0.4, 0.2 and 0, of qualities 0.
    """
    with database.write() as session:
        made = make_run(session, teachers=TEACHERS, prompts=6, calibration=3, holdout=1, stage="generate")
        row = session.get_one(Run, made.id)
        row.config = {**row.config, "quality": {"kind": "math"}}  # so 0 is wrong
        answered(session, made, 0, [(1, -1), (0, -2), (0, -3)])
        answered(session, made, 1, [(1, -1), (1, -1), (1, -1)])
        answered(session, made, 2, [(1, -1), None, None])
        answered(session, made, 3, [(0, -1), (0, -2), (0, -3)])
    return made


def write(database: Database, run: MadeRun, folder: Path, kind: str, **options: Any) -> Manifest:
    return export.write(database, run.id, folder, ExportOptions(kind=kind, **options))


def compared(folder: Path) -> list[tuple[str, str, float]]:
    """Chosen, rejected and margin of each pair."""
    return [
        (row["chosen"][0]["content"], row["rejected"][0]["content"], round(row["margin"], 9))
        for row in lines(folder / "preference.jsonl")
    ]


def test_a_pair_is_the_best_and_the_worst_response_of_a_prompt(
    database: Database, run: MadeRun, tmp_path: Path
) -> None:
    manifest = write(database, run, tmp_path / "out", "preference")

    first, second = lines(tmp_path / "out" / "preference.jsonl")
    assert first["prompt"] == [{"role": "user", "content": "run: prompt 0?"}]
    assert first["chosen"] == [{"role": "assistant", "content": "a 0"}]
    assert first["rejected"] == [{"role": "assistant", "content": "c 0"}]
    assert math.isclose(first["margin"], 1.0)
    assert (first["chosen_reward"], first["rejected_reward"]) == (1.0, 0.0)
    assert (first["chosen_quality"], first["rejected_quality"], first["rejected_learnability"]) == (1.0, 0.0, -3.0)
    assert (first["chosen_teacher"], first["rejected_teacher"]) == ("a", "c")
    assert first["chosen_teacher_fingerprint"] == digest("teacher a")
    assert (first["id"], first["prompt_id"], first["is_holdout"]) == (
        digest("run: prompt 0?"),
        run.prompt_ids[0],
        False,
    )
    with database.read() as session:
        chosen, rejected = (session.get_one(Response, first[f"{side}_response_id"]) for side in ("chosen", "rejected"))
        assert (chosen.text, rejected.text) == ("a 0", "c 0")
    assert second["is_holdout"] is True
    assert (manifest.assigned, manifest.used, manifest.exported, manifest.holdout) == (4, 2, 2, 1)
    assert manifest.dropped == {"no_reward": 1, "no_pair": 1}
    dropped = [(row["prompt_id"], row["filter"]) for row in lines(tmp_path / "out" / "dropped.jsonl")]
    assert dropped == [(run.prompt_ids[1], "no_pair"), (run.prompt_ids[2], "no_reward")]


@SQLITE
def test_every_response_of_a_row_counts_for_its_teacher(database: Database, run: MadeRun, tmp_path: Path) -> None:
    """c has only rejected responses. Quality is 0 for 5 of the 9 best ones, and for the chosen one of prompt 3."""
    with database.write() as session:
        session.query(Teacher).filter(Teacher.name == "a").update({"license": "mit"})
        session.query(Response).filter(Response.text == "c 0").update({"finish_reason": "length"})

    chosen = write(database, run, tmp_path / "pairs", "preference")
    best = write(database, run, tmp_path / "best", "best-of")

    counted = [[(each.exported, each.truncated) for each in of.teachers] for of in (chosen, best)]
    assert counted == [[(2, 0), (0, 0), (2, 1)], [(3, 0), (3, 0), (3, 1)]]
    assert [(of.exported, of.responses, of.wrong, of.engines) for of in (chosen, best)] == [
        (2, 4, 1, {"fake 1": 4}),
        (3, 9, 5, {"fake 1": 9}),
    ]
    assert [card.wrong(of) for of in (chosen, best)] == ["1 of 2 chosen responses", "5 of 9 responses"]
    of_pairs, of_best = ((tmp_path / name / "README.md").read_text() for name in ("pairs", "best"))
    assert "no licence is stated for c." in of_pairs
    assert "no licence is stated for b, c." in of_best
    assert "| responses | share |" in of_pairs
    assert "| c | c | not stated | 2 | 50.0% |" in of_pairs
    assert "**5 responses are known to be wrong**" in of_best


@SQLITE
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"pairs": "best-each"},
            [("a 0", "c 0", 1.0), ("a 0", "b 0", 0.8), ("a 3", "c 3", 0.4), ("a 3", "b 3", 0.2)],
        ),
        (
            {"pairs": "all", "min_margin": 0.3},
            [("a 0", "c 0", 1.0), ("a 0", "b 0", 0.8), ("a 3", "c 3", 0.4)],
        ),
        ({"pairs": "all", "higher_quality": True}, [("a 0", "c 0", 1.0), ("a 0", "b 0", 0.8)]),
        ({"drop_wrong": True}, [("a 0", "c 0", 1.0)]),  # the rejected one may be wrong
    ],
)
def test_options_say_which_pairs(
    database: Database, run: MadeRun, tmp_path: Path, options: dict[str, Any], expected: list[Any]
) -> None:
    write(database, run, tmp_path / "out", "preference", **options)

    assert compared(tmp_path / "out") == expected
    ids = [row["id"] for row in lines(tmp_path / "out" / "preference.jsonl")]
    assert len(set(ids)) == len(ids)


def test_a_response_whose_text_is_unknown_is_compared_and_is_in_no_row(
    database: Database, run: MadeRun, tmp_path: Path
) -> None:
    """The rewards are the run's, as in the fixture: without teacher c, that of b would be 0."""
    with database.write() as session:
        for response in session.query(Response).filter(Response.teacher_id == run.teacher_ids[2]):
            response.text, response.failure = None, NO_TEXT

    manifest = write(database, run, tmp_path / "pairs", "preference")
    write(database, run, tmp_path / "best", "best-of")

    assert compared(tmp_path / "pairs") == [("a 0", "b 0", 0.8), ("a 3", "b 3", 0.2)]
    assert manifest.dropped == {"no_reward": 1, "no_pair": 1}
    rewards = [
        [(each["response"]["content"], round(each["reward"], 9)) for each in row["responses"]]
        for row in lines(tmp_path / "best" / "best_of.jsonl")
    ]
    assert rewards == [[("a 0", 1.0), ("b 0", 0.2)], [("a 1", 0.0), ("b 1", 0.0)], [("a 3", 0.4), ("b 3", 0.2)]]


@SQLITE
def test_equal_texts_are_no_pair_and_a_filter_leaves_responses_out(
    database: Database, run: MadeRun, tmp_path: Path
) -> None:
    with database.write() as session:
        for response in session.query(Response).filter(Response.prompt_id == run.prompt_ids[0]):
            if response.text in ("a 0", "c 0"):
                response.text = "same"
        for response in session.query(Response).filter(Response.prompt_id == run.prompt_ids[3]):
            response.finish_reason = "length" if response.text in ("a 3", "b 3") else "stop"

    manifest = write(database, run, tmp_path / "out", "preference", finish_reasons=("stop",))

    assert compared(tmp_path / "out") == [("same", "b 0", 0.8)]
    assert manifest.dropped == {"finish_reason": 1, "no_reward": 1, "no_pair": 1}
    assert manifest.assigned == 4 == manifest.used + sum(manifest.dropped.values())
    by_filter = [
        (row["prompt_id"], row["teacher"])
        for row in lines(tmp_path / "out" / "dropped.jsonl")
        if row["filter"] == "finish_reason"
    ]
    assert by_filter == [(run.prompt_ids[3], "a"), (run.prompt_ids[3], "b")]


@SQLITE
def test_prompts_overlap_with_benchmarks_and_each_other_as_in_any_dataset(
    database: Database, run: MadeRun, tmp_path: Path
) -> None:
    (tmp_path / "bench.jsonl").write_text('{"q": "run: prompt 0?"}\n')
    benchmarks = (str(tmp_path / "bench.jsonl"),)

    manifest = write(database, run, tmp_path / "out", "preference", benchmarks=benchmarks)
    similar = write(database, run, tmp_path / "similar", "best-of", near_duplicates=0.5)

    assert [row[0] for row in compared(tmp_path / "out")] == ["a 3"]
    assert manifest.dropped == {"contaminated": 1, "no_reward": 1, "no_pair": 1}
    assert manifest.benchmarks[0].dropped == 3  # responses
    # Word triples: {run prompt 0}, {run prompt 1}, ...: different prompts, of which none is a near-duplicate.
    assert similar.dropped["near_duplicate"] == 0


@SQLITE
@pytest.mark.parametrize("kind", ["preference", "best-of"])
def test_a_prompt_without_a_row_leaves_none_of_its_near_duplicates_out(
    database: Database, run: MadeRun, tmp_path: Path, kind: str
) -> None:
    """Of three prompts of the same words, all responses to the first are wrong, so the second one is kept."""
    with database.write() as session:
        similar = [make_prompt(session, f"How many are two and two{mark}") for mark in ("?", "!", ".")]
        session.add_all(RunPrompt(run_id=run.id, prompt_id=each, role=Role.CALIBRATION) for each in similar)
        of_similar = MadeRun(run.id, run.teacher_ids, similar)
        answered(session, of_similar, 0, [(0, -1), (0, -2), (0, -3)])
        answered(session, of_similar, 1, [(1, -1), (0, -2), (0, -3)])
        answered(session, of_similar, 2, [(1, -1), (0, -2), (0, -3)])

    manifest = write(database, run, tmp_path / "out", kind, near_duplicates=0.9, drop_wrong=True)

    rows = lines(tmp_path / "out" / f"{kind.replace('-', '_')}.jsonl")
    assert similar[1] in {row["prompt_id"] for row in rows}
    assert not {similar[0], similar[2]} & {row["prompt_id"] for row in rows}
    assert (manifest.dropped["near_duplicate"], manifest.dropped["wrong"]) == (1, 2)  # wrong: prompt 3, too
    left_out = [row for row in lines(tmp_path / "out" / "dropped.jsonl") if row["filter"] == "near_duplicate"]
    assert [(row["prompt_id"], row["teacher"], row["found"]) for row in left_out] == [
        (similar[2], "", f"prompt {similar[1]}")
    ]


@SQLITE
def test_samples_are_responses_of_their_own(database: Database, tmp_path: Path) -> None:
    """With qualities 1, 0 | 0, 0 and equal learnability, the first teacher's own two samples are a pair."""
    with database.write() as session:
        run = make_run(session, teachers=("a", "b"), prompts=1, calibration=1)
        row = session.get_one(Run, run.id)
        row.config = {**row.config, "run": {**row.config["run"], "samples": 2}}
        for teacher in range(2):
            for sample in range(2):
                text = f"{'ab'[teacher]}{sample}"
                response = make_response(session, run.prompt_ids[0], run.teacher_ids[teacher], text, sample=sample)
                quality = float((teacher, sample) == (0, 0))
                for scorer, value, n in (
                    (row.quality_scorer_id, quality, None),
                    (row.learnability_scorer_id, -1.0 - sample, 1),
                ):
                    session.add(Score(response_id=response, scorer_id=scorer, value=value, n_tokens=n, detail={}))

    write(database, run, tmp_path / "out", "preference")

    (row,) = lines(tmp_path / "out" / "preference.jsonl")
    assert (row["chosen"][0]["content"], row["rejected"][0]["content"]) == ("a0", "a1")
    assert (row["chosen_sample"], row["rejected_sample"]) == (0, 1)


@SQLITE
def test_llama_factory_reads_pairs_by_their_entries(database: Database, run: MadeRun, tmp_path: Path) -> None:
    write(database, run, tmp_path / "out", "preference")

    entries = json.loads((tmp_path / "out" / "dataset_info.json").read_text())
    assert set(entries) == {"run_preference_sharegpt", "run_preference_alpaca"}
    sharegpt = lines(tmp_path / "out" / entries["run_preference_sharegpt"]["file_name"])[0]
    alpaca = lines(tmp_path / "out" / entries["run_preference_alpaca"]["file_name"])[0]
    assert all(
        entry["ranking"] and set(entry["columns"].values()) <= {*sharegpt, *alpaca} for entry in entries.values()
    )
    assert sharegpt["conversations"] == [{"from": "human", "value": "run: prompt 0?"}]
    assert (sharegpt["chosen"], sharegpt["rejected"]) == (
        {"from": "gpt", "value": "a 0"},
        {"from": "gpt", "value": "c 0"},
    )
    assert (alpaca["instruction"], alpaca["chosen"], alpaca["rejected"]) == ("run: prompt 0?", "a 0", "c 0")


@SQLITE
def test_reasoning_is_where_it_is_in_any_dataset(database: Database, run: MadeRun, tmp_path: Path) -> None:
    with database.write() as session:
        for response in session.query(Response).filter(Response.text == "a 0"):
            response.reasoning = "Hm."

    write(database, run, tmp_path / "field", "preference")
    write(database, run, tmp_path / "drop", "preference", reasoning="drop", formats=("messages",))

    row, other = lines(tmp_path / "field" / "preference.jsonl")
    assert row["chosen"][0] == {"role": "assistant", "content": "a 0", "reasoning_content": "Hm."}
    assert row["rejected"][0]["reasoning_content"] == other["chosen"][0]["reasoning_content"] == ""
    inlined = lines(tmp_path / "field" / "preference_alpaca.jsonl")[0]
    assert inlined["chosen"] == "<think>\nHm.\n</think>\n\na 0"
    assert pq.read_table(tmp_path / "field" / "preference.parquet")["chosen"].to_pylist()[0] == row["chosen"]
    assert lines(tmp_path / "drop" / "preference.jsonl")[0]["chosen"] == [{"role": "assistant", "content": "a 0"}]


@SQLITE
def test_a_format_that_cannot_hold_tools_is_refused_by_name(database: Database, run: MadeRun, tmp_path: Path) -> None:
    with database.write() as session:
        tool = {"type": "function", "function": {"name": "look", "parameters": {}}}
        asked = make_prompt(session, "Look!", tools=[tool])
        session.add(RunPrompt(run_id=run.id, prompt_id=asked, role=Role.CALIBRATION))
        make_assignment(session, run.id, asked, run.teacher_ids[0])
        answered(session, MadeRun(run.id, run.teacher_ids, [asked]), 0, [(1, -1), (0, -2), (0, -3)])

    manifest = write(database, run, tmp_path / "out", "preference")
    with pytest.raises(UsageError, match="format 'verl' cannot represent tools"):
        write(database, run, tmp_path / "no", "teachers", formats=("verl",))

    assert {file.format for file in manifest.files} == {"messages", "sharegpt", "parquet"}
    assert [row["tools"] for row in lines(tmp_path / "out" / "preference.jsonl")] == [[], [], [tool]]


def test_best_of_has_the_responses_in_the_order_of_their_rewards(
    database: Database, run: MadeRun, tmp_path: Path
) -> None:
    manifest = write(database, run, tmp_path / "out", "best-of", best=2)

    first, second, third = lines(tmp_path / "out" / "best_of.jsonl")
    assert [(each["response"]["content"], each["reward"]) for each in first["responses"]] == [
        ("a 0", 1.0),
        ("b 0", 0.2),
    ]
    assert [each["teacher"] for each in second["responses"]] == ["a", "b"]  # all equal: in head order
    assert third["is_holdout"] is True
    assert (manifest.exported, manifest.dropped) == (3, {"no_reward": 1})
    stored = pq.read_table(tmp_path / "out" / "best_of.parquet").to_pylist()
    assert [row["responses"] for row in stored] == [row["responses"] for row in (first, second, third)]


def test_teachers_has_the_prompt_s_teacher_and_what_all_were_rated(
    database: Database, run: MadeRun, tmp_path: Path
) -> None:
    scores = (math.log(1), math.log(2), math.log(5))
    with database.write() as session:
        session.get_one(Run, run.id).router_id = router = make_router(session, run)
        make_assignment(session, run.id, run.prompt_ids[0], run.teacher_ids[0], reason="calibration")
        make_assignment(session, run.id, run.prompt_ids[4], run.teacher_ids[2])
        make_assignment(session, run.id, run.prompt_ids[5], run.teacher_ids[1], rejected=True)
        session.add_all(
            RouterScore(router_id=router, prompt_id=run.prompt_ids[4], teacher_id=teacher_id, score=score)
            for teacher_id, score in zip(run.teacher_ids, scores, strict=True)
        )

    manifest = write(database, run, tmp_path / "out", "teachers")

    rated, routed = lines(tmp_path / "out" / "teachers.jsonl")
    assert (rated["teacher_id"], rated["scored_by"], rated["probabilities"]) == ("a", "reward", [])
    assert [(each["teacher_id"], round(each["score"], 9)) for each in rated["scores"]] == [
        ("a", 1.0),
        ("b", 0.2),
        ("c", 0.0),
    ]
    assert (routed["teacher_id"], routed["scored_by"], routed["reason"]) == ("c", "router", "router")
    assert [each["score"] for each in routed["scores"]] == list(scores)
    assert [round(each["probability"], 9) for each in routed["probabilities"]] == [0.125, 0.25, 0.625]
    gym = lines(tmp_path / "out" / "teachers_nemo_gym.jsonl")[1]
    assert gym["responses_create_params"] == {"input": [{"role": "user", "content": "run: prompt 4?"}]}
    assert gym["agent_ref"] == {"type": "responses_api_agents", "name": "c"}
    verl = pq.read_table(tmp_path / "out" / "teachers.parquet").to_pylist()[1]
    assert verl["prompt"] == [{"role": "user", "content": "run: prompt 4?"}]
    assert (verl["teacher_id"], verl["data_source"], verl["ability"]) == ("c", "prompts.jsonl", "")
    assert verl["reward_model"] == {"style": "rule", "ground_truth": ""}
    assert (manifest.assigned, manifest.exported, manifest.rejected) == (3, 2, 1)
    assert {each.name: each.exported for each in manifest.teachers} == {"a": 1, "b": 0, "c": 1}


@SQLITE
@pytest.mark.parametrize("kind", [name for name in KINDS if name != "sft"])
def test_datasets_loads_every_text_format_of_every_kind(
    database: Database, run: MadeRun, tmp_path: Path, kind: str
) -> None:
    from datasets import load_dataset

    with database.write() as session:
        for prompt_id in run.prompt_ids[:2]:
            make_assignment(session, run.id, prompt_id, run.teacher_ids[0], reason="calibration")

    manifest = write(database, run, tmp_path / "out", kind)

    for file in manifest.files:
        read = load_dataset(
            "parquet" if file.name.endswith(".parquet") else str(tmp_path / "out"),
            **(
                {"data_files": str(tmp_path / "out" / file.name)}
                if file.name.endswith(".parquet")
                else {"name": file.format}
            ),
            cache_dir=str(tmp_path / "cache"),
            split="train",
        )
        assert read.num_rows == manifest.exported
    said = (tmp_path / "out" / "README.md").read_text()
    assert f"persyn export run --kind {kind}" in said
    assert f"{manifest.exported:,} " in said


@SQLITE
def test_a_folder_keeps_its_kind_and_nothing_is_trained_on_pairs(
    database: Database, run: MadeRun, tmp_path: Path
) -> None:
    write(database, run, tmp_path / "out", "preference")

    with pytest.raises(UsageError, match="contains a dataset of the kind preference, not best-of"):
        write(database, run, tmp_path / "out", "best-of")
    with (
        pytest.raises(UsageError, match="kind preference has no responses to train on"),
        database.read() as session,
    ):
        list(export.training_rows(session, run.id, ExportOptions(kind="preference")))
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    write(database, run, tmp_path / "out", "preference")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"kind": "pairs"}, "no kind of dataset named 'pairs'.*available: sft, preference, best-of, teachers"),
        ({"kind": "preference", "cap": 3}, r"cap \(--cap\) does not apply to the kind preference"),
        ({"kind": "teachers", "drop_wrong": True}, r"drop_wrong \(--drop-wrong\) does not apply to the kind teachers"),
        ({"min_margin": 0.1}, r"min_margin \(--min-margin\) does not apply to the kind sft"),
        ({"kind": "preference", "formats": ("verl",)}, "no format of the kind preference named 'verl'"),
        ({"kind": "preference", "min_margin": -1.0}, "minimum margin must be 0 or more"),
        ({"kind": "best-of", "best": 0}, "best responses must be 1 or more"),
    ],
)
def test_an_option_of_another_kind_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        ExportOptions(**given)


@SQLITE
def test_nothing_to_export_says_why(database: Database, run: MadeRun, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match="nothing to export as preference: 4 calibration prompts: no_reward 1, no_pair 3"
    ):
        write(database, run, tmp_path / "out", "preference", min_margin=1.5)

    assert not (tmp_path / "out").exists()


@SQLITE
def test_the_memory_of_an_export_does_not_grow_with_the_grid(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, size = 600, 2_000
    with database.write() as session:
        run = make_run(session, teachers=TEACHERS, prompts=n, calibration=n)
        for number in range(n):
            answered(session, run, number, [(1, -1), (0, -2), (0, -3)])
        for response in session.query(Response):
            response.text = f"{response.text} {'x' * size}"

    tracemalloc.start()
    manifest = write(database, run, tmp_path / "out", "preference", formats=("messages", "alpaca"), pairs="all")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert manifest.exported == 3 * n
    assert peak < sum(file.bytes for file in manifest.files) / 3


def test_pairs_have_no_ties_and_no_missing_rewards() -> None:
    rewards = np.array([0.5, np.nan, 1.0, 1.0, 0.0])
    anything = np.ones((5, 5), dtype=bool)

    def chosen(which: pairs.Which, may_win: Sequence[bool] = (True,) * 5, least: float = 0.0) -> list[tuple[int, int]]:
        return pairs.choose(rewards, np.array(may_win), anything, which=which, min_margin=least)

    assert chosen("best-worst") == [(2, 4)]
    assert chosen("best-each") == [(2, 4), (2, 0)]
    assert chosen("all") == [(2, 4), (2, 0), (3, 4), (3, 0), (0, 4)]
    assert chosen("all", least=0.6) == [(2, 4), (3, 4)]
    assert chosen("best-worst", may_win=[True, False, False, False, False]) == [(0, 4)]
    assert chosen("all", may_win=[False] * 5) == []


@SQLITE
def test_kinds_are_a_table_and_a_folder_in_python(database: Database, run: MadeRun, tmp_path: Path) -> None:
    with persyn.open(tmp_path / "persyn.db", home=tmp_path / "home") as store:
        options = ExportOptions(kind="preference", splits={"test": 0.5})
        table = store.run("run").dataset(options)
        with pytest.warns(UserWarning, match="no licence is stated for a, c:"):
            written = store.run("run").export(options=options)

    assert (table.num_rows, written.exported) == (2, 2)
    assert {"chosen", "rejected", "margin", "split"} <= set(table.column_names)
    assert written.folder == tmp_path / "home" / "datasets-preference" / "run"
    assert "2 rows (preference) of 2 of 4 calibration prompts" in repr(written)
