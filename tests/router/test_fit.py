"""Fit, measure, store and use a router through its two engines, as in a run."""

from __future__ import annotations

import json
import re
import shutil
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from topics import TEACHERS, conversations, grid
from transformers import Trainer

from persyn.errors import EngineError, UsageError
from persyn.llm.chat import Chat, load_tokenizer
from persyn.llm.identity import identify
from persyn.llm.options import RouterFitOptions
from persyn.llm.protocols import Engine, Failed, Fitted, ModelSpec, Request, Result, Route, Routed
from persyn.method import routing_metrics
from persyn.router import checkpoint, fit, model, route
from persyn.router.model import Reader, RouterModel, pair_loss
from persyn.router.train import RouterExamples, TrainingPlan, split, train
from tests.four_gpus import OnFourGpus

Work: TypeAlias = Callable[[Engine, Sequence[Request]], list[Result]]

#: A random two-layer backbone tolerates larger steps than a real one.
FAST: dict[str, dict[str, Any]] = {
    "head": {},
    "auto": {"epochs": 4, "learning_rate": 1e-4, "batch_size": 8},
    "lora": {"epochs": 8, "learning_rate": 3e-3, "batch_size": 8, "lora_rank": 4},
    "full": {"epochs": 8, "learning_rate": 3e-4, "batch_size": 8},
}


def rest() -> None:
    """A tick that nobody observes."""


def fitter(backbone: Path, **options: Any) -> Engine:
    return fit.load(ModelSpec("router_fit", str(backbone), options=options), rest)


def router(folder: Path | str, **options: Any) -> Engine:
    return route.load(ModelSpec("router", str(folder), options=options), rest)


def scores(results: list[Result]) -> np.ndarray[Any, np.dtype[np.float64]]:
    assert all(isinstance(result, Routed) for result in results)
    return np.array([result.scores for result in results if isinstance(result, Routed)])


def routes(n: int) -> list[Route]:
    return [Route(i, messages) for i, messages in enumerate(conversations(n))]


@pytest.mark.model
def test_a_router_learns_whom_each_topic_suits(smollm2: Path, work: Work, tmp_path: Path) -> None:
    request = grid(45, holdout=18, folder=tmp_path / "router")

    (fitted,) = work(fitter(smollm2), [request])

    assert isinstance(fitted, Fitted)
    found = fitted.metrics
    assert found["router"]["hit1"] > 0.9
    assert found["static"]["hit1"] < 0.5
    assert found["random"]["hit1"] == pytest.approx(0.25)
    assert found["oracle"]["hit1"] == found["oracle"]["pair_accuracy"] == 1.0
    assert found["oracle"]["regret"] == 0.0
    assert found["router"]["routed_reward"] > found["static"]["routed_reward"] + 0.1
    assert (found["n_calibration"], found["n_holdout"], found["n_pairs"]) == (27, 18, 27 * 6)
    assert found["tune"] == "head"
    assert {"persyn", "torch", "transformers"} <= found["versions"].keys()


@pytest.mark.parametrize("tune", ["head", "lora", "full", "auto"])
def test_what_was_measured_is_what_the_checkpoint_routes(tiny: Path, work: Work, tmp_path: Path, tune: str) -> None:
    request = grid(48, holdout=12, tune=tune, folder=tmp_path / "router")

    (fitted,) = work(fitter(tiny, **FAST[tune]), [request])

    assert isinstance(fitted, Fitted)
    routed = scores(work(router(fitted.folder, sha256=fitted.sha256), routes(48)))
    rewards = np.array(request.rewards)
    assert (
        routing_metrics.compare(routed[36:], rewards[36:], rewards[:36], preferences="weighted")["router"]
        == fitted.metrics["router"]
    )


@pytest.fixture
def examples(tiny: Path, tmp_path: Path) -> RouterExamples:
    request = grid(48, folder=tmp_path)
    reader = Reader(Chat(load_tokenizer(ModelSpec("router", str(tiny)))), 128)
    return RouterExamples([reader.ids(messages) for messages in request.conversations], np.array(request.rewards))


def trained(
    tiny: Path, examples: RouterExamples, tune: str, ticks: list[int], **changes: Any
) -> tuple[RouterModel, dict[str, Any]]:
    options = RouterFitOptions(**{**FAST[tune], **changes})
    plan = TrainingPlan(
        tune, "weighted", 0, 4096, options.epochs, options.learning_rate or 0.0, options.batch_size, options.lora_rank
    )
    router = model.load(ModelSpec("router_fit", str(tiny)), "float32", len(TEACHERS))
    features = model.all_features(router, examples.prompts, plan.batch_tokens, lambda: None)
    return router, train(router, examples, features, plan, lambda: ticks.append(1))


def loss_of(router: RouterModel, examples: RouterExamples) -> float:
    with torch.no_grad():
        weights = torch.from_numpy(examples.weights("weighted"))
        return pair_loss(router(*model.pad(examples.prompts)), weights).item()


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_fine_tuning_goes_beyond_the_head(
    tiny: Path, examples: RouterExamples, tune: str, capfd: pytest.CaptureFixture[str]
) -> None:
    ticks: list[int] = []

    headed, _ = trained(tiny, examples, "head", ticks)
    tuned, notes = trained(tiny, examples, tune, ticks)

    assert loss_of(tuned, examples) < 0.9 * loss_of(headed, examples)
    assert notes["best_step"] > 0
    assert notes["n_validation"] == 10  # a fifth of 48, since a tenth would be fewer than 25
    assert len(ticks) > 20
    assert capfd.readouterr().out == ""


def test_a_training_that_makes_nothing_better_changes_nothing(tiny: Path, examples: RouterExamples) -> None:
    untouched = model.load(ModelSpec("router_fit", str(tiny)), "float32", len(TEACHERS)).backbone.state_dict()

    ruined, notes = trained(tiny, examples, "full", [], learning_rate=1.0)

    assert notes["best_step"] == 0
    assert notes["steps"] < 24
    for name, weight in ruined.backbone.state_dict().items():
        assert torch.equal(weight, untouched[name])


def test_further_gpus_of_the_host_change_nothing(
    tiny: Path, examples: RouterExamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, notes = trained(tiny, examples, "full", [], epochs=1)
    monkeypatch.setattr("persyn.router.fine_tune.TrainingArguments", OnFourGpus)

    assert notes["steps"] == 5  # 38 prompts, 8 per step
    assert trained(tiny, examples, "full", [], epochs=1)[1] == notes


def test_weights_that_are_no_numbers_are_never_the_best(tiny: Path, examples: RouterExamples) -> None:
    # Without shuffling, the first teachers are the best, and the validation prompts follow.
    rewards = np.tile([0.0, 0.3, 0.6, 1.0], (48, 1))
    rewards[split(48, seed=0)[1]] = [1.0, 0.3, 0.6, 0.5]

    ruined, notes = trained(tiny, RouterExamples(examples.prompts, rewards), "full", [], learning_rate=1e38)

    assert notes["best_step"] == 0
    assert all(weight.isfinite().all() for weight in ruined.state_dict().values())


@pytest.mark.parametrize("tune", ["head", "lora", "full"])
def test_the_same_seed_gives_the_same_checkpoint(tiny: Path, work: Work, tmp_path: Path, tune: str) -> None:
    request = grid(24, tune=tune, folder=tmp_path / "router")
    repeated = msgspec.structs.replace(request, id=2)
    other = msgspec.structs.replace(request, id=3, folder=str(tmp_path / "other"), seed=1)

    first, again, differently = work(fitter(tiny, **FAST[tune]), [request, repeated, other])

    assert isinstance(first, Fitted)
    assert isinstance(again, Fitted)
    assert isinstance(differently, Fitted)
    assert first.sha256 == again.sha256 == checkpoint.sha256(tmp_path / "router")
    assert tune == "head" or differently.sha256 != first.sha256
    assert sorted(path.name for path in tmp_path.iterdir()) == ["features", "other", "router"]


def test_a_checkpoint_says_what_it_is_and_pickles_nothing(tiny: Path, work: Work, tmp_path: Path) -> None:
    for tune in ("head", "lora", "full"):
        work(fitter(tiny, **FAST[tune] | {"epochs": 1}), [grid(12, tune=tune, folder=tmp_path / tune)])

    said = json.loads((tmp_path / "lora" / "router.json").read_text())
    assert said["backbone"] == str(tiny)
    assert (said["tune"], said["teachers"], said["max_tokens"]) == ("lora", TEACHERS, 128)
    targets = json.loads((tmp_path / "lora" / "adapter" / "adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(targets)
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".json", ".jinja", ".safetensors"}


def test_a_checkpoint_that_is_not_what_it_should_be_is_refused(tiny: Path, work: Work, tmp_path: Path) -> None:
    folder = tmp_path / "router"
    (fitted,) = work(fitter(tiny), [grid(12, folder=folder)])
    assert isinstance(fitted, Fitted)

    with pytest.raises(EngineError, match=r"missing or has changed .*not 0123"):
        router(folder, sha256="0123")
    with pytest.raises(EngineError, match="not a router's checkpoint"):
        router(tmp_path / "elsewhere")
    shutil.copytree(folder, tmp_path / "other")
    (tmp_path / "other" / "training_args.bin").write_bytes(b"")
    with pytest.raises(EngineError, match=r"training_args\.bin"):
        router(tmp_path / "other")


def test_a_prompt_routes_the_same_alone_as_among_others_and_however_long(
    tiny: Path, work: Work, tmp_path: Path
) -> None:
    work(fitter(tiny), [grid(24, folder=tmp_path / "router")])
    long = Route(24, [{"role": "user", "content": "What is 1 plus 2? " * 500}])
    requests = [*routes(24), long]

    together = scores(work(router(tmp_path / "router", batch_tokens=300), requests))
    engine = router(tmp_path / "router")
    alone = np.vstack([scores(work(engine, [request])) for request in requests[::6]])

    np.testing.assert_allclose(together[::6], alone, rtol=0, atol=1e-4)
    assert together.shape == (25, len(TEACHERS))


def test_without_a_holdout_a_router_is_fitted_and_not_measured(tiny: Path, work: Work, tmp_path: Path) -> None:
    (fitted,) = work(fitter(tiny), [grid(12, folder=tmp_path / "router")])

    assert isinstance(fitted, Fitted)
    assert [fitted.metrics[name] for name in ("router", "static", "random", "oracle")] == [None] * 4
    assert msgspec.json.decode(msgspec.json.encode(fitted.metrics)) == fitted.metrics


def test_a_grid_with_holes_and_ties_is_fitted_to_what_is_there(tiny: Path, work: Work, tmp_path: Path) -> None:
    request = grid(24, folder=tmp_path / "router")
    rewards = np.array(request.rewards)
    rewards[::2, 1] = np.nan
    rewards[1] = 0.5
    rewards[3] = np.nan

    (fitted,) = work(fitter(tiny), [msgspec.structs.replace(request, rewards=rewards.tolist())])

    assert isinstance(fitted, Fitted)
    assert fitted.metrics["n_pairs"] == 12 * 3 + 10 * 6


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rewards": [[0.5] * 4] * 12}, "no_preferences: none of 12"),
        ({"rewards": [[0.5, 1.0, 0.2, float("nan")]] * 12}, "unmeasured_teachers: .* generalist"),
        ({"is_holdout": [True] * 12}, "no_preferences: none of 0"),
        ({"tune": "some"}, "unknown_tune: 'some'; available: auto, full, lora, head"),
        ({"rewards": [[0.5, 1.0]] * 12}, "malformed: expected a row of 4 rewards"),
        ({"is_holdout": [False]}, "malformed: "),
    ],
)
def test_a_grid_that_cannot_be_fitted_fails_with_its_reason(
    tiny: Path, work: Work, tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    request = msgspec.structs.replace(grid(12, folder=tmp_path / "router"), **change)

    (failed,) = work(fitter(tiny), [request])

    assert isinstance(failed, Failed)
    assert re.match(reason, failed.reason)
    assert not list(tmp_path.iterdir())


def test_auto_tunes_in_full_where_that_makes_a_better_router(tiny: Path, work: Work, tmp_path: Path) -> None:
    asked = grid(150, tune="auto", folder=tmp_path / "auto")
    (fitted, full) = work(
        fitter(tiny, **FAST["auto"]), [asked, msgspec.structs.replace(asked, id=2, tune="full", folder="full")]
    )

    assert isinstance(fitted, Fitted)
    assert isinstance(full, Fitted)
    assert fitted.metrics["tune"] == "full"
    assert fitted.metrics["loss_full"] < fitted.metrics["loss_head"]
    assert fitted.scores == full.scores
    assert json.loads((tmp_path / "auto" / "router.json").read_text())["tune"] == "full"


def test_auto_keeps_to_the_head_where_nothing_can_be_read_off_a_prompt(tiny: Path, work: Work, tmp_path: Path) -> None:
    asked = grid(96, tune="auto", folder=tmp_path / "auto")
    dealt = np.random.default_rng(0).permutation(np.array(asked.rewards)).tolist()
    asked = msgspec.structs.replace(asked, rewards=dealt)
    (fitted, head) = work(
        fitter(tiny, **FAST["auto"]), [asked, msgspec.structs.replace(asked, id=2, tune="head", folder="head")]
    )

    assert isinstance(fitted, Fitted)
    assert isinstance(head, Fitted)
    assert fitted.metrics["tune"] == "head"
    assert fitted.scores == head.scores
    assert not (tmp_path / "auto" / "backbone").exists()


def test_auto_holds_one_backbone_at_a_time(
    tiny: Path, work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = grid(60, tune="auto", folder=tmp_path / "auto")
    dealt = np.random.default_rng(0).permutation(np.array(asked.rewards)).tolist()
    alive: weakref.WeakSet[RouterModel] = weakref.WeakSet()
    held: list[int] = []
    make = RouterModel.__init__

    def noted(self: RouterModel, *arguments: Any, **named: Any) -> None:
        make(self, *arguments, **named)
        alive.add(self)

    monkeypatch.setattr(RouterModel, "__init__", noted)
    engine = fit.load(ModelSpec("router_fit", str(tiny), options=FAST["auto"]), lambda: held.append(len(alive)))

    (fitted,) = work(engine, [msgspec.structs.replace(asked, rewards=dealt)])

    assert isinstance(fitted, Fitted)
    assert fitted.metrics["tune"] == "head"
    assert "loss_full" in fitted.metrics
    assert max(held) == 1


def test_auto_does_not_train_in_full_where_too_few_prompts_could_judge_it(
    tiny: Path, work: Work, tmp_path: Path
) -> None:
    (fitted,) = work(fitter(tiny, **FAST["auto"]), [grid(40, tune="auto", folder=tmp_path / "router")])

    assert isinstance(fitted, Fitted)
    assert fitted.metrics["tune"] == "head"
    assert fitted.metrics["not_full"] == "8 validation prompts are too few to decide"


def test_a_training_that_a_gpu_has_no_room_for_leaves_auto_the_head_and_fails_who_asked_for_it(
    tiny: Path, work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crowded(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(Trainer, "train", crowded)
    asked = grid(60, tune="auto", folder=tmp_path / "router")

    (fitted,) = work(fitter(tiny), [asked])

    assert isinstance(fitted, Fitted)
    assert fitted.metrics["tune"] == "head"
    assert "does not fit in the GPU's memory (CUDA out of memory" in fitted.metrics["not_full"]
    with pytest.raises(EngineError, match="tune = 'full' does not fit in the GPU's memory"):
        work(fitter(tiny), [msgspec.structs.replace(asked, tune="full")])


def test_so_does_one_that_the_machine_has_no_memory_for(
    tiny: Path, work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: there._replace(available=10 * 2**20))
    asked = grid(60, tune="auto", folder=tmp_path / "router")

    (fitted,) = work(fitter(tiny), [asked])  # 1.6 million weights

    assert isinstance(fitted, Fitted)
    assert fitted.metrics["tune"] == "head"
    assert "tune = 'full' does not fit in memory (0.0 billion weights take 0 GiB more" in fitted.metrics["not_full"]
    with pytest.raises(EngineError, match="does not fit in memory"):
        work(fitter(tiny), [msgspec.structs.replace(asked, tune="full")])


def altered(tiny: Path, folder: Path, value: float) -> Path:
    """The same backbone with one weight changed."""
    shutil.copytree(tiny, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_router_is_not_laid_on_another_backbone_than_it_was_fitted_to(tiny: Path, work: Work, tmp_path: Path) -> None:
    backbone = shutil.copytree(tiny, tmp_path / "backbone")
    for tune in ("head", "lora", "full"):
        work(fitter(backbone, **FAST[tune] | {"epochs": 1}), [grid(12, tune=tune, folder=tmp_path / tune)])
    was = json.loads((tmp_path / "head" / "router.json").read_text())["revision"]
    assert was == identify(str(backbone)).revision
    shutil.rmtree(backbone)
    altered(tiny, backbone, 3.0)

    for tune in ("head", "lora"):
        with pytest.raises(UsageError, match=f"has changed: it is sha256:.*, and was {was}"):
            router(tmp_path / tune)
    assert scores(work(router(tmp_path / "full"), routes(1))).shape == (1, len(TEACHERS))  # has its own backbone
    with pytest.raises(UsageError, match="has changed"):
        fit.load(ModelSpec("router_fit", str(backbone), was), rest)


def test_states_that_are_no_numbers_are_not_taken_for_features(tiny: Path, work: Work, tmp_path: Path) -> None:
    backbone = altered(tiny, tmp_path / "backbone", float("nan"))
    with pytest.raises(EngineError, match=r"not finite in torch\.float32; set dtype"):
        work(fitter(backbone), [grid(12, folder=tmp_path / "router")])
    assert not (tmp_path / "features").exists()


@pytest.mark.parametrize(
    ("n", "n_validation"),
    [(1, 1), (2, 1), (50, 10), (100, 20), (125, 25), (200, 25), (250, 25), (2_500, 250)],
)
def test_a_tenth_decides_when_training_stops_or_25_prompts_if_they_are_no_more_than_a_fifth(
    n: int, n_validation: int
) -> None:
    learn, validate = split(n, seed=0)

    assert len(validate) == n_validation
    assert sorted(set(learn) | set(validate)) == list(range(n))
    assert n == 1 or not set(learn) & set(validate)


@pytest.mark.parametrize("tune", ["head", "lora", "full", "auto"])
def test_a_single_preference_is_enough_for_a_router(tiny: Path, work: Work, tmp_path: Path, tune: str) -> None:
    request = msgspec.structs.replace(grid(1, tune=tune, folder=tmp_path / "router"), rewards=[[0.0, 0.0, 1.0, 0.0]])

    work(fitter(tiny, **FAST[tune]), [request])

    assert scores(work(router(tmp_path / "router"), routes(2))).argmax(axis=1).tolist() == [2, 2]


def test_wrong_options_are_named(tiny: Path) -> None:
    with pytest.raises(EngineError, match="learning_rat"):
        fitter(tiny, learning_rat=0.1)
    with pytest.raises(EngineError, match="one GPU"):
        fit.load(ModelSpec("router_fit", str(tiny), gpus=2), rest)
