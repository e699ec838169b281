"""Errors in a run file are found when it is read, and located in the file's own terms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from persyn.errors import UsageError
from persyn.runs import run_file

JUDGE = {"kind": "judge", "model": "judge", "options": {"engine": "vllm"}}


def write(folder: Path, *, teacher: dict[str, Any] | None = None, **tables: Any) -> Path:
    """Write a run file with these tables replacing valid ones; `teacher` replaces the second teacher."""
    file = folder / "run.json"
    right = {
        "run": {"name": "test", "setting": "math"},
        "prompts": {"file": "prompts.jsonl"},
        "student": {"name": "student", "model": "lab/student"},
        "quality": {"kind": "math"},
        "teachers": [{"name": "ada", "model": "lab/ada"}, {"name": "bob", "model": "lab/bob"} | (teacher or {})],
    }
    file.write_bytes(msgspec.json.encode(right | tables))
    return file


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            {"teacher": {"options": {"max_model_length": 8}}},
            "teacher bob (vllm): unknown key 'max_model_length' in [teachers.options]; did you mean 'max_model_len'?",
        ),
        (
            {"teacher": {"engine": "openai", "options": {"concurrency": 8}}},
            "teacher bob (openai): 'base_url' is missing in [teachers.options]",
        ),
        (
            {"teacher": {"engine": "transformers", "options": {"dtype": "bf16"}}},
            "teacher bob (transformers): `teachers.options.dtype` is 'bf16'; allowed: 'bfloat16', 'float16', 'float32'",
        ),
        (
            {"student": {"name": "s", "model": "lab/s", "options": {"response_tokens": 0}}},
            "the student (log_likelihood): Expected `int` >= 1 - at `student.options.response_tokens`, got 0",
        ),
        (
            {"quality": {"kind": "math", "options": {"timeout": 3}}},
            "the quality (math): unknown key 'timeout' in [quality.options]; did you mean 'timeout_seconds'?",
        ),
        (
            {"quality": {"kind": "python", "model": "my:scorer", "options": {"strict": True}}},
            "the quality (python): unknown key 'strict' in [quality.options]; known keys: none",
        ),
        (
            {"quality": JUDGE | {"options": {"engine": "vllm", "scale": "high"}}},
            "the quality (judge): Expected `int`, got `str` - at `quality.options.scale`, got 'high'",
        ),
        (
            {"quality": JUDGE | {"options": {"engine": "vllm", "options": {"max_len": 8}}}},
            "the judge's model (vllm): unknown key 'max_len' in [quality.options.options]; "
            "did you mean 'max_model_len'?",
        ),
        (
            {"router": {"options": {"epoch": 3}}},
            "the router (router_fit): unknown key 'epoch' in [router.options]; did you mean 'epochs'?",
        ),
    ],
)
def test_an_option_that_its_engine_does_not_take_is_found_before_any_model_loads(
    tmp_path: Path, wrong: dict[str, Any], said: str
) -> None:
    file = write(tmp_path, **wrong)
    with pytest.raises(UsageError) as refused:
        run_file.read(file)
    assert str(refused.value) == f"{file}: {said}"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"run": {"name": "test"}}, "'setting' is missing in [run]"),
        ({"run": {"name": "test", "setting": "poems"}}, "`run.setting` is 'poems'; allowed: 'instruct', 'math'"),
        (
            {"teacher": {"sampling": {"temprature": 1}}},
            "unknown key 'temprature' in [teachers.sampling]; did you mean 'temperature'?",
        ),
        ({"router": {"gpus": -1}}, "Expected `int` >= 0 - at `router.gpus`, got -1"),
        ({"router": {"gpus": 2}}, "Expected `int` <= 1 - at `router.gpus`, got 2"),
        (
            {"run": {"name": "test", "setting": "math", "calibration": 2**64}},
            "`run.calibration` is an integer of more than 64 bits: 18446744073709551616",
        ),
        (
            {"teacher": {"options": {"max_model_len": -(2**70)}}},
            "`teachers[1].options.max_model_len` is an integer of more than 64 bits: -1180591620717411303424",
        ),
        (
            {"teacher": {"model": "a\0b"}},
            "`teachers[1].model` has a NUL character, which the database cannot store: 'a\\x00b'",
        ),
        (
            {"student": {"name": "s", "model": "~nosuchuser/x"}},
            "`student.model` is '~nosuchuser/x', which cannot be looked up: Could not determine home directory.",
        ),
        ({"prompts": {"file": "~nosuchuser/x"}}, "`prompts.file` is '~nosuchuser/x', which cannot be looked up: "),
        ({"router": {"backbone": "~nosuchuser/x"}}, "`router.backbone` is '~nosuchuser/x', which cannot be looked up"),
        (
            {"quality": {"kind": "reward_model", "model": "~nosuchuser/x"}},
            "`quality.model` is '~nosuchuser/x', which cannot be looked up",
        ),
        (
            {"teacher": {"model": "m" * 300}},
            f"`teachers[1].model` is '{'m' * 198}…, which cannot be looked up: File name too long",
        ),
        ({"student": {"name": "a b", "model": "x"}}, "`student.name` is not a valid name"),
        ({"students": {"name": "s"}}, "unknown key 'students' in the file; did you mean 'student'?"),
    ],
)
def test_a_mistake_in_a_table_is_named_with_its_place(tmp_path: Path, wrong: dict[str, Any], said: str) -> None:
    file = write(tmp_path, **wrong)
    with pytest.raises(UsageError) as refused:
        run_file.read(file)
    assert str(refused.value).startswith(f"{file}: {said}")


def test_options_that_an_engine_takes_are_kept_as_they_are_and_what_was_imported_is_not_asked(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        teacher={"engine": "imported", "options": {"whatever": 1}},
        quality=JUDGE | {"options": {"engine": "transformers", "scale": 5, "options": {"batch_size": 4}}},
        router={"options": {"epochs": 2, "dtype": "float32"}},
    )
    read = run_file.read(file)
    assert read.teachers[1].options == {"whatever": 1}
    assert read.quality.options == {"engine": "transformers", "scale": 5, "options": {"batch_size": 4}}
    assert read.router.options == {"epochs": 2, "dtype": "float32"}


def test_the_teachers_of_a_file_of_their_own_are_checked_alike(tmp_path: Path) -> None:
    file = tmp_path / "teachers.json"
    file.write_bytes(msgspec.json.encode({"teachers": [{"name": "ada", "engine": "fake", "options": {"words": 3}}]}))
    with pytest.raises(UsageError) as refused:
        run_file.read_teachers(file)
    assert str(refused.value).startswith(f"{file}: teacher ada (fake): unknown key 'words' in [teachers.options]")


@pytest.mark.parametrize("number", ["inf", "-inf", "nan"])
def test_a_number_that_is_none_is_named_with_its_place(tmp_path: Path, number: str) -> None:
    file = tmp_path / "run.toml"
    file.write_text(f'[run]\nname = "test"\n[[teachers]]\nname = "ada"\nsampling = {{ temperature = {number} }}\n')
    for reader in (run_file.read, run_file.read_teachers):
        with pytest.raises(UsageError) as refused:
            reader(file)
        assert str(refused.value) == (
            f"{file}: `teachers[0].sampling.temperature` is {number}; it must be a finite number"
        )


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("run.json", '{"a":1', "not JSON: Input data was truncated"),
        ("run.json", '{"run": {"name": 3}', "not JSON: Input data was truncated"),
        ("run.json", '{"run": {"alpha": 1e999}}', "not JSON: Number out of range"),
        ("run.json", "[" * 100_000, "not JSON: maximum recursion depth exceeded"),
        ("run.toml", "a = 1\nb = ", "not TOML: Invalid value"),
        ("run.toml", "teachers = 1\nb = ", "not TOML: Invalid value"),
        ("run.toml", "a = " + "1" * 5_000, "not TOML: Exceeds the limit"),
    ],
)
def test_a_file_that_is_broken_is_said_to_be_whatever_stands_before_the_break(
    tmp_path: Path, name: str, text: str, said: str
) -> None:
    file = tmp_path / name
    file.write_text(text)
    for reader in (run_file.read, run_file.read_teachers):
        with pytest.raises(UsageError) as refused:
            reader(file)
        assert str(refused.value).startswith(f"{file}: {said}")


def test_a_hub_id_stays_one_beside_a_file_of_its_owners_name(tmp_path: Path) -> None:
    (tmp_path / "lab").write_text("no folder")
    assert run_file.read(write(tmp_path)).student.model == "lab/student"
