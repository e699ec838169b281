"""The router of a run is found again by versions that can fit more kinds of routers."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec
import pytest

from persyn.llm.protocols import Fit, ModelSpec
from persyn.stages import fit_router

SPEC = ModelSpec("router_fit", "/backbone", "sha256:1", options={"max_tokens": 64})
FIT = Fit(
    id=0,
    conversations=[[{"role": "user", "content": "2+2?"}]],
    rewards=[[1.0, 0.0]],
    is_holdout=[False],
    teachers=["ada", "bob"],
    tune="auto",
    seed=7,
    folder="",
)


def before(fit: Fit) -> str:
    """As versions with one kind of router computed it, field by field."""
    names = ["id", "conversations", "rewards", "is_holdout", "teachers", "tune", "seed", "folder", "preferences"]
    fields = {"type": "fit", **{name: getattr(fit, name) for name in names}}
    return hashlib.sha256(msgspec.msgpack.encode((SPEC, fields, [3, 4]))).hexdigest()


def test_a_head_keeps_the_fingerprint_that_it_had() -> None:
    assert fit_router._fingerprint(SPEC, FIT, [3, 4]) == before(FIT)
    assert fit_router._fingerprint(SPEC, msgspec.structs.replace(FIT, folder="x"), [3, 4]) == before(FIT)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "auto"},
        {"encoders": ["backbone", "tfidf"]},
        {"labels": {"topic": ["sums"]}},
        {"embedding": "/e"},
        {"embedding_version": "sha256:2"},
        {"errors": [[0.1, 0.1]]},
    ],
)
def test_another_router_has_another_fingerprint(change: dict[str, Any]) -> None:
    assert fit_router._fingerprint(SPEC, msgspec.structs.replace(FIT, **change), [3, 4]) != before(FIT)
