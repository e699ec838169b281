"""Every kind of router is fitted, stored, served and explained by the two engines."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from topics import TEACHERS, TOPICS, conversations, grid

from persyn.errors import UsageError
from persyn.llm.identity import identify_embedding
from persyn.llm.protocols import Engine, Failed, Fit, Fitted, ModelSpec, Request, Result, Route, Routed
from persyn.router import encoders, fit, route
from persyn.router.kinds import choice
from persyn.router.kinds.base import Examples, Explanation
from persyn.router.kinds.registry import ROUTERS
from tests import tiny_models

Work: TypeAlias = Callable[[Engine, Sequence[Request]], list[Result]]

N, HOLDOUT = 30, 6


def rest() -> None:
    """A tick that nobody observes."""


def labels(n: int) -> dict[str, list[str | None]]:
    """The topic of each prompt but the first, as a field of its row."""
    names = list(TOPICS)
    return {"topic": [None if i == 0 else names[i % len(names)] for i in range(n)]}


def asked(folder: Path, **changes: Any) -> Fit:
    return msgspec.structs.replace(grid(N, holdout=HOLDOUT, folder=folder), labels=labels(N), **changes)


def routes(n: int, **options: Any) -> list[Route]:
    topics = labels(n)["topic"]
    return [Route(i, turns, labels={"topic": topics[i]}, **options) for i, turns in enumerate(conversations(n))]


def fitted_by(work: Work, backbone: Path | str, request: Fit) -> Fitted:
    (found,) = work(fit.load(ModelSpec("router_fit", str(backbone)), rest), [request])
    assert isinstance(found, Fitted), found
    return found


def routed_by(work: Work, folder: str, requests: Sequence[Route]) -> list[Routed]:
    found = work(route.load(ModelSpec("router", folder), rest), requests)
    return [each for each in found if isinstance(each, Routed)]


@pytest.mark.parametrize("kind", ROUTERS)
def test_each_kind_routes_after_a_round_trip_as_it_was_measured(
    tiny: Path, work: Work, tmp_path: Path, kind: str
) -> None:
    request = asked(tmp_path / "router", kind=kind, encoders=["backbone", "tfidf"])

    fitted = fitted_by(work, tiny, request)
    routed = routed_by(work, fitted.folder, routes(N, explain=True))

    np.testing.assert_allclose([each.scores for each in routed], fitted.scores, rtol=0, atol=1e-6)
    assert fitted.metrics["kind"] == kind
    # Cross-fitted scores are there for the calibration prompts alone, and are not those of the router itself.
    without = fitted.cross_fitted
    assert [row is None for row in without] == request.is_holdout
    assert (kind == "static") or without[: N - HOLDOUT] != fitted.scores[: N - HOLDOUT]
    assert np.isfinite([row for row in without if row is not None]).all()
    for each in routed:
        msgspec.convert(each.explanation, list[Explanation])
    assert {path.suffix for path in Path(fitted.folder).iterdir()} == {".json", ".safetensors"}


@pytest.mark.parametrize("kind", ["clusters", "head"])
def test_scores_of_every_kind_are_log_odds(work: Work, tmp_path: Path, kind: str) -> None:
    request = msgspec.structs.replace(grid(120, folder=tmp_path / "router"), labels=labels(120), kind=kind, encoders=[])
    rewards = np.array(request.rewards)
    rewards[::3] = np.random.default_rng(0).permuted(rewards[::3], axis=1)  # the topic predicts two of three prompts

    fitted = fitted_by(work, "", msgspec.structs.replace(request, rewards=rewards.tolist()))

    known = ~np.array(request.is_holdout)
    without = np.array([row for row in fitted.cross_fitted or [] if row is not None])
    assert choice.log_odds_scale(without, Examples(rewards[known])) == pytest.approx(1.0, rel=1e-3)


def test_auto_takes_a_kind_that_reads_the_topic_and_says_why(work: Work, tmp_path: Path) -> None:
    fitted = fitted_by(work, "", asked(tmp_path / "router", kind="auto", encoders=[]))

    said = fitted.metrics
    assert said["kind"] != "static"
    assert {"static", "clusters", "head"} <= {each["kind"] for each in said["candidates"]}
    assert said["why"].startswith(f"{said['kind']}: cross-validated reward")
    assert (said["encoders"], said["features"]) == ([], ["topic"])
    assert said["router"]["hit1"] == 1.0
    # Another label, or none, is routed too.
    strange = Route(0, conversations(1)[0], labels={"topic": "<script>"})
    assert np.isfinite(routed_by(work, fitted.folder, [strange])[0].scores).all()


def test_auto_without_anything_to_tell_prompts_apart_stays_with_the_best_teacher(work: Work, tmp_path: Path) -> None:
    request = asked(tmp_path / "router", kind="auto", encoders=[])
    dealt = np.random.default_rng(0).permutation(np.array(request.rewards)).tolist()
    fitted = fitted_by(work, "", msgspec.structs.replace(request, rewards=dealt))

    assert fitted.metrics["kind"] == "static"
    best = int(np.nanmean(np.array(dealt)[: N - HOLDOUT], axis=0).argmax())
    assert {int(np.argmax(row)) for row in fitted.scores} == {best}


def test_words_alone_need_no_model(work: Work, tmp_path: Path) -> None:
    request = msgspec.structs.replace(grid(60, folder=tmp_path / "router"), kind="linear", encoders=["tfidf"])
    fitted = fitted_by(work, "", request)

    (routed,) = routed_by(work, fitted.folder, [Route(1, conversations(2)[1], explain=True)])
    assert TEACHERS[int(np.argmax(routed.scores))] == "poet"
    (said,) = msgspec.convert(routed.explanation, list[Explanation])
    assert "poem" in " ".join(word.text for word in said.words)  # type: ignore[union-attr]
    assert json.loads((Path(fitted.folder) / "router.json").read_text())["backbone"] == ""


def test_what_the_grid_needed_is_not_computed_again(
    tiny: Path, work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted = fitted_by(work, tiny, asked(tmp_path / "router", kind="neighbours"))

    def refuse(*_: Any) -> Any:
        raise AssertionError("a language model was loaded")

    monkeypatch.setattr(encoders.model, "load", refuse)
    routed = routed_by(work, fitted.folder, routes(N, explain=True))

    np.testing.assert_allclose([each.scores for each in routed], fitted.scores, rtol=0, atol=1e-6)
    (near,) = msgspec.convert(routed[3].explanation, list[Explanation])
    assert near.prompts[0] == 3  # type: ignore[union-attr]
    assert all(prompt % len(TOPICS) == 0 for prompt in near.prompts)  # type: ignore[union-attr]


def test_a_backbone_that_changed_since_the_fit_is_refused(tiny: Path, work: Work, tmp_path: Path) -> None:
    fitted = fitted_by(work, tiny, asked(tmp_path / "router", kind="neighbours"))
    manifest = json.loads((tmp_path / "router" / "router.json").read_text())
    (tmp_path / "router" / "router.json").write_text(json.dumps(manifest | {"revision": "sha256:other"}))

    with pytest.raises(UsageError, match=r"has changed: it is sha256:.*, and was sha256:other"):
        route.load(ModelSpec("router", fitted.folder), rest)


def test_a_head_of_a_version_before_still_routes(tiny: Path, work: Work, tmp_path: Path) -> None:
    fitted = fitted_by(work, tiny, asked(tmp_path / "new", kind="neighbours"))
    manifest = json.loads((tmp_path / "new" / "router.json").read_text())
    old = tmp_path / "old"
    old.mkdir()
    for key in ("kind", "encoders", "features", "embedding", "embedding_version"):
        del manifest[key]
    (old / "router.json").write_text(json.dumps(manifest | {"tune": "head", "reads": "middle"}))
    torch.manual_seed(0)
    weight, bias = torch.randn(len(TEACHERS), 32), torch.randn(len(TEACHERS))
    save_file({"weight": weight, "bias": bias}, old / "router.safetensors")

    routed = routed_by(work, str(old), routes(3))

    read = encoders.of_fit(ModelSpec("router_fit", str(tiny)), grid(N, folder=tmp_path), tmp_path).backbone
    assert read is not None
    states = read.states(conversations(3), rest, keep=False)
    assert encoders.FROZEN == "middle"
    torch.testing.assert_close(torch.tensor([each.scores for each in routed]), states @ weight.T + bias)
    assert fitted.folder != str(old)


def test_a_fit_of_an_unknown_kind_or_with_labels_missing_fails_with_its_reason(work: Work, tmp_path: Path) -> None:
    request = asked(tmp_path / "router", kind="nearest")
    short = msgspec.structs.replace(request, id=2, kind="head", labels={"topic": ["sums"]})

    unknown, malformed = work(fit.load(ModelSpec("router_fit", ""), rest), [request, short])

    assert isinstance(unknown, Failed)
    assert unknown.reason.startswith("unknown_kind: 'nearest'; available: auto, static, ")
    assert isinstance(malformed, Failed)
    assert malformed.reason.startswith("malformed: ")


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    return tiny_models.embedding_model(tmp_path_factory.mktemp("embedder") / "model", tiny)


def test_an_embedding_is_read_beside_the_labels_and_verified(work: Work, tmp_path: Path, embedder: Path) -> None:
    version = identify_embedding(str(embedder)).revision
    request = asked(
        tmp_path / "router",
        kind="neighbours",
        encoders=["embedding"],
        embedding=str(embedder),
        embedding_version=version,
    )
    fitted = fitted_by(work, "", request)

    routed = routed_by(work, fitted.folder, routes(N))
    np.testing.assert_allclose([each.scores for each in routed], fitted.scores, rtol=0, atol=1e-5)
    assert fitted.metrics["embedding_version"] == version
    pooling = embedder / "1_Pooling" / "config.json"
    before = pooling.read_text()
    pooling.write_text(before + "\n")
    try:
        with pytest.raises(UsageError, match="has changed"):
            route.load(ModelSpec("router", fitted.folder), rest)
    finally:
        pooling.write_text(before)
