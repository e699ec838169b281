"""Comparisons of students, with numbers computed by hand."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy.orm import Session

from persyn.db.catalog import Run
from persyn.db.connect import Database
from persyn.db.trained import Evaluation, Outcome, Training
from persyn.errors import UsageError
from persyn.student import outcomes
from tests.factories import digest, make_prompt, make_run, make_scorer


class Trained:
    """Runs of one student, and evaluations of it on the same four prompts."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.prompts = [make_prompt(session, f"asked {n}?") for n in range(4)]
        self.runs: list[Run] = []

    def run(self, name: str, strategy: str, alpha: float = 0.4) -> Run:
        run = self.session.get_one(Run, make_run(self.session, name=name, prompts=1).id)
        config = dict(run.config)
        config["strategy"] = {"kind": strategy}
        config["run"] = {**config["run"], "alpha": alpha}
        run.config = config
        self.runs.append(run)
        return run

    def evaluation(
        self, run: Run, values: Sequence[float | None], *, trained: bool = True, **more: Any
    ) -> Training | None:
        """Add an evaluation of a new training, or of the given one; return the training."""
        training = more.pop("training", None) or Training(
            run_id=run.id,
            student_id=run.student_id,
            fingerprint=digest(f"training {run.name} {more}"),
            dataset_hash=digest("dataset"),
            settings=more.get("settings", {"tune": "full", "epochs": 3, "seed": 0}),
            notes={},
            path=run.name,
            revision="r",
        )
        if trained:
            self.session.add(training)
            self.session.flush()
        kind = more.get("kind", "math")
        evaluation = Evaluation(
            fingerprint=digest(f"evaluation {run.name} {trained} {more}"),
            student_id=run.student_id,
            training_id=training.id if trained else None,
            scorer_id=make_scorer(self.session, kind),
            name="test.jsonl",
            prompts_hash=digest("prompts"),
            how=more.get("how", {}),
            finished_at=None if more.get("unfinished") else datetime.now(UTC),
        )
        self.session.add(evaluation)
        self.session.flush()
        tokens = more.get("tokens", [None] * len(values))
        for prompt_id, value, n_tokens in zip(self.prompts, values, tokens, strict=True):
            failure = "too_long: x" if value is None else None
            row = {"evaluation_id": evaluation.id, "prompt_id": prompt_id, "value": value, "failure": failure}
            self.session.add(Outcome(**row, n_tokens=n_tokens))
        self.session.flush()
        return training if trained else None


def test_runs_of_one_strategy_are_one_row_best_first(database: Database) -> None:
    with database.write() as session:
        made = Trained(session)
        made.evaluation(made.run("base", "static"), [1, 0, 0, 0], trained=False)
        made.evaluation(made.run("a", "persyn"), [1, 1, 1, 0])
        made.evaluation(made.run("b", "persyn"), [1, 1, 0, 0])
        made.evaluation(made.run("c", "car"), [1, 0, 1, 0])
        facts = outcomes.compare(session, made.runs)

    assert [(f.strategy, f.alpha, f.n_trainings, f.value and f.value.mean) for f in facts] == [
        ("persyn", 0.4, 2, 0.625),
        ("car", 0.4, 1, 0.5),
        ("untrained", None, 0, 0.25),
    ]
    assert [None if f.gain is None else f.gain.mean for f in facts] == [0.375, 0.25, None]
    assert all(f.value is not None and f.value.low <= f.value.mean <= f.value.high for f in facts)
    assert (facts[0].student, facts[0].prompts, facts[0].by, facts[0].n_prompts) == ("student", "test.jsonl", "math", 4)


def test_a_gain_is_taken_on_the_same_prompts(database: Database) -> None:
    """For any drawn prompts, a student that is right on the same ones has gained nothing."""
    with database.write() as session:
        made = Trained(session)
        made.evaluation(made.run("base", "static"), [1, 0, 1, 0], trained=False)
        made.evaluation(made.run("a", "car"), [1, 0, 1, 0])
        facts = outcomes.compare(session, made.runs)

    gain = facts[0].gain or facts[1].gain
    assert gain is not None
    assert (gain.mean, gain.low, gain.high) == (0.0, 0.0, 0.0)


def test_a_function_goes_by_its_name_and_each_version_of_it_alone(database: Database) -> None:
    with database.write() as session:
        made = Trained(session)
        for name, model, version, right in (("a", "m:f", "1", 1), ("b", "m:f", "2", 0), ("c", "m:g", "1", 0.5)):
            run = made.run(name, "python")
            run.config = {**run.config, "strategy": {"kind": "python", "model": model, "revision": version}}
            made.evaluation(run, [right] * 4)
        facts = outcomes.compare(session, made.runs)

    assert [(f.strategy, f.value and f.value.mean) for f in facts] == [("m:f", 1.0), ("m:g", 0.5), ("m:f", 0.0)]


def test_another_alpha_is_another_strategy(database: Database) -> None:
    with database.write() as session:
        made = Trained(session)
        made.evaluation(made.run("a", "persyn", alpha=0.0), [1, 1, 1, 1])
        made.evaluation(made.run("b", "persyn", alpha=1.0), [0, 0, 0, 0])
        facts = outcomes.compare(session, made.runs)

    assert [(f.alpha, f.value and f.value.mean, f.gain) for f in facts] == [(0.0, 1.0, None), (1.0, 0.0, None)]


def test_a_value_that_failed_is_left_out_and_counted(database: Database) -> None:
    with database.write() as session:
        made = Trained(session)
        made.evaluation(made.run("a", "persyn"), [1, 0, None, None])
        (fact,) = outcomes.compare(session, made.runs)

    assert (fact.value and fact.value.mean, fact.n_failed) == (0.5, 2)


def test_a_likelihood_is_a_loss_over_tokens_and_lower_is_better(database: Database) -> None:
    with database.write() as session:
        made = Trained(session)
        kind = {"kind": "log_likelihood", "tokens": [1, 1, 2, 4]}
        made.evaluation(made.run("a", "persyn"), [-2.0, -2.0, -4.0, -8.0], **kind)
        made.evaluation(made.run("b", "car"), [-1.0, -1.0, -1.0, -1.0], **kind)
        facts = outcomes.compare(session, made.runs)

    assert [(f.strategy, f.value and f.value.mean) for f in facts] == [("car", 0.5), ("persyn", 2.0)]


def test_a_perplexity_is_of_the_loss_over_all_tokens_and_of_a_likelihood_alone(database: Database) -> None:
    with database.write() as session:
        made = Trained(session)
        kind = {"kind": "log_likelihood", "tokens": [1, 1, 2, 4]}
        # -4 nats over 8 tokens: the loss is 0.5. The mean of per-response losses, 0.6875, would give 1.9887.
        made.evaluation(made.run("a", "car"), [-1.0, -1.0, -1.0, -1.0], **kind)
        made.evaluation(made.run("b", "persyn"), [-8000.0, None, None, None], **kind)
        made.evaluation(made.run("c", "static"), [1, 1, 0, 0])
        facts = outcomes.compare(session, made.runs)

    found = {fact.strategy: fact.perplexity for fact in facts}
    assert found == {"car": pytest.approx(1.6487, abs=1e-4), "persyn": None, "static": None}


def test_what_was_asked_in_another_way_is_another_measure(database: Database) -> None:
    with database.write() as session:
        made = Trained(session)
        run = made.run("a", "persyn")
        made.evaluation(run, [0, 0, 0, 0], how={"sampling": {"max_tokens": 16}})
        made.evaluation(run, [1, 1, 1, 1], how={"sampling": {"max_tokens": 512}})
        facts = outcomes.compare(session, made.runs)

    assert [(f.value and f.value.mean, f.n_trainings) for f in facts] == [(0.0, 1), (1.0, 1)]


def test_a_training_that_was_evaluated_again_on_other_gpus_counts_once(database: Database) -> None:
    with database.write() as session:
        made = Trained(session)
        run = made.run("a", "persyn")
        training = made.evaluation(run, [0, 0, 0, 0], how={"gpus": 0})
        made.evaluation(run, [1, 1, 1, 1], how={"gpus": 1}, training=training)
        (fact,) = outcomes.compare(session, made.runs)

    assert (fact.n_trainings, fact.value and fact.value.mean) == (1, 1.0)


def test_another_training_is_another_row_and_another_seed_is_not(database: Database) -> None:
    with database.write() as session:
        made = Trained(session)
        run = made.run("a", "persyn")
        made.evaluation(run, [1, 1, 1, 1], settings={"tune": "full", "epochs": 3, "seed": 0})
        made.evaluation(run, [1, 1, 0, 0], settings={"tune": "full", "epochs": 3, "seed": 1})
        made.evaluation(run, [0, 0, 0, 0], settings={"tune": "lora", "epochs": 3, "seed": 0})
        facts = outcomes.compare(session, made.runs)

    assert [(f.training, f.n_trainings, f.value and f.value.mean) for f in facts] == [
        ("full, 3 epochs", 2, 0.75),
        ("lora, 3 epochs", 1, 0.0),
    ]


def test_a_student_that_was_not_trained_yet_is_shown(database: Database) -> None:
    with database.write() as session:
        made = Trained(session)
        made.evaluation(made.run("base", "static"), [1, 0, 0, 0], trained=False)
        (fact,) = outcomes.compare(session, made.runs)

    assert (fact.strategy, fact.n_trainings, fact.value and fact.value.mean) == ("untrained", 0, 0.25)


def test_where_nothing_has_a_value_there_is_none(database: Database) -> None:
    with database.write() as session:
        made = Trained(session)
        made.evaluation(made.run("base", "static"), [1, 0, 0, 0], trained=False)
        made.evaluation(made.run("a", "persyn"), [None, None, None, None])
        facts = outcomes.compare(session, made.runs)

    assert [(f.strategy, f.n_failed, f.gain) for f in facts] == [("untrained", 0, None), ("persyn", 4, None)]
    assert facts[1].value is None


def test_a_lower_loss_is_a_gain_above_zero(database: Database) -> None:
    with database.write() as session:
        made = Trained(session)
        kind = {"kind": "log_likelihood", "tokens": [1, 1, 1, 1]}
        made.evaluation(made.run("base", "static"), [-3.0, -3.0, -3.0, -3.0], trained=False, **kind)
        made.evaluation(made.run("a", "persyn"), [-1.0, -1.0, -1.0, -1.0], **kind)
        facts = outcomes.compare(session, made.runs)

    assert facts[0].gain is not None
    assert facts[0].gain.mean == 2.0


def test_what_is_not_finished_is_not_compared(database: Database) -> None:
    with database.write() as session:
        made = Trained(session)
        made.evaluation(made.run("a", "persyn"), [1, 1, 1, 1], unfinished=True)
        with pytest.raises(UsageError, match="no student of these runs has been evaluated: persyn student train"):
            outcomes.compare(session, made.runs)
