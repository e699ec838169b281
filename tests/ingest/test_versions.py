"""What makes two teachers the same: everything that can change a response, and nothing else."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from persyn.config import TeacherTable
from persyn.ingest import versions
from persyn.llm.engines import ENGINES, EngineKind
from persyn.llm.identity import Identity
from persyn.llm.options import EngineOptions

KNOWN = {("m", None): Identity("sha256:1", None)}
SAMPLING = {
    "max_tokens": 1024,
    "temperature": 0.7,
    "top_p": 1.0,
    "top_k": 0,
    "repetition_penalty": 1.0,
    "stop": [],
}


def identity(engine: str, *, gpus: int = 0, options: dict[str, Any] | None = None, **columns: Any) -> dict[str, Any]:
    table = {"name": "ada", "model": "m", "engine": engine, "gpus": gpus, "options": options or {}, **columns}
    return versions.teacher_identity(msgspec.convert(table, TeacherTable), KNOWN)


@pytest.mark.parametrize(
    ("engine", "options", "expected"),
    [
        (
            "vllm",
            {"dtype": "auto", "max_model_len": None, "quantization": None, "add_bos": None, "enforce_eager": True},
            {"revision": "sha256:1"},
        ),
        (
            "transformers",
            {"dtype": "float32", "max_model_len": None, "add_bos": None, "batch_size": 3},
            {"revision": "sha256:1", "options": {"dtype": "float32"}},
        ),
        ("openai", {"extra": {}, "omit": [], "base_url": "http://x/v1", "concurrency": 2}, {"model": "m"}),
        ("fake", {"fail_every": 0, "crash_on": None, "hang_on": None, "response_words": 12}, {"model": "m"}),
    ],
)
def test_a_default_that_is_written_out_changes_no_version(
    engine: str, options: dict[str, Any], expected: dict[str, Any]
) -> None:
    """It also fails if a default changes: stored fingerprints then mean another value, and need a migration."""
    written = identity(engine, options=options, sampling=SAMPLING, system=None, few_shot=[], revision=None)
    assert written == {"engine": engine, **expected}


def test_a_field_that_is_new_counts_once_it_differs_from_its_default() -> None:
    class Longer(msgspec.Struct, frozen=True):
        effort: str = "low"

    table = msgspec.defstruct(
        "Table", [("new", Longer, Longer()), ("note", str | None, None)], bases=(TeacherTable,), frozen=True
    )
    same = {"name": "ada", "model": "m", "engine": "fake", "gpus": 0}
    plain, other = (msgspec.convert({**same, **more}, table) for more in ({}, {"new": {"effort": "high"}}))
    assert versions.teacher_identity(plain, {}) == {"engine": "fake", "model": "m"}
    assert versions.teacher_identity(other, {}) == {"engine": "fake", "model": "m", "new": {"effort": "high"}}


def test_the_device_counts_where_it_decides_the_data_type() -> None:
    assert identity("transformers", gpus=1) == identity("transformers", gpus=4)
    assert identity("transformers", gpus=1) == identity("transformers", options={"dtype": "bfloat16"})
    assert identity("transformers", gpus=1) != identity("transformers")
    assert identity("vllm", gpus=1) == identity("vllm", gpus=0)


def test_a_plug_in_that_calls_something_transport_that_is_no_option_is_refused() -> None:
    class Options(EngineOptions, frozen=True):
        address: str = ""

    with pytest.raises(ValueError, match="transport of engine 'x' names no option of it: adress"):
        EngineKind(name="x", summary="", module="", options=Options, transport=frozenset({"adress"}))
    for kind in ENGINES.values():
        fields = kind.options.__struct_fields__ if kind.options else ()
        assert {name.partition(".")[0] for name in kind.transport} <= set(fields)
