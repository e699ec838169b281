"""Errors in a run file are found when it is read, and located in the file's own terms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from msgspec import structs

from persyn.config import Sampling
from persyn.errors import UsageError
from persyn.runs import run_file

RIGHT: dict[str, Any] = {
    "run": {"name": "test", "setting": "math"},
    "prompts": {"file": "prompts.jsonl"},
    "student": {"name": "student", "model": "lab/student"},
    "quality": {"kind": "math"},
    "teachers": [{"name": "ada", "model": "lab/ada"}, {"name": "bob", "model": "lab/bob"}],
}
NAME = "1 to 100 letters, digits and . _ : + @ -, beginning with a letter or a digit"
JUDGE = {"kind": "judge", "model": "judge", "options": {"engine": "vllm"}}


def with_run(**keys: Any) -> dict[str, Any]:
    return {"run": RIGHT["run"] | keys}


def with_bob(**keys: Any) -> dict[str, Any]:
    return {"teachers": [RIGHT["teachers"][0], RIGHT["teachers"][1] | keys]}


def write(folder: Path, *, teacher: dict[str, Any] | None = None, **tables: Any) -> Path:
    """Write a run file with these tables replacing valid ones; `teacher` replaces the second teacher."""
    file = folder / "run.json"
    file.write_bytes(msgspec.json.encode(RIGHT | with_bob(**(teacher or {})) | tables))
    return file


def require_refusal(file: Path, said: str) -> None:
    with pytest.raises(UsageError) as refused:
        run_file.read(file)
    assert str(refused.value) == f"{file}: {said}"


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
            {"teacher": {"engine": "openai", "options": {"base_url": "http://a/v1", "extra": 3}}},
            "teacher bob (openai): `teachers.options.extra` must be a table, got 3",
        ),
        (
            {"teacher": {"engine": "transformers", "options": {"dtype": "bf16"}}},
            "teacher bob (transformers): `teachers.options.dtype` is 'bf16'; allowed: 'bfloat16', 'float16', 'float32'",
        ),
        (
            {"student": {"name": "s", "model": "lab/s", "options": {"response_tokens": 0}}},
            "the student (log_likelihood): `student.options.response_tokens` must be an integer >= 1, got 0",
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
            "the quality (judge): `quality.options.scale` must be an integer >= 2 and <= 100, got the text 'high'",
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
    require_refusal(write(tmp_path, **wrong), said)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"run": {"name": "test"}}, "'setting' is missing in [run]"),
        ({"run": {"name": "test", "setting": "poems"}}, "`run.setting` is 'poems'; allowed: 'instruct', 'math'"),
        (
            {"teacher": {"sampling": {"temprature": 1}}},
            "teacher bob: unknown key 'temprature' in [teachers.sampling]; did you mean 'temperature'?",
        ),
        ({"router": {"gpus": -1}}, "`router.gpus` must be an integer >= 0 and <= 1, got -1"),
        ({"router": {"gpus": 2}}, "`router.gpus` must be an integer >= 0 and <= 1, got 2"),
        (
            {"run": {"name": "test", "setting": "math", "calibration": 2**64}},
            "`run.calibration` is an integer of more than 64 bits: 18446744073709551616",
        ),
        (
            {"teacher": {"options": {"max_model_len": -(2**70)}}},
            "teacher bob: `teachers.options.max_model_len` is an integer of more than 64 bits: -1180591620717411303424",
        ),
        (
            {"teacher": {"model": "a\0b"}},
            "teacher bob: `teachers.model` has a NUL character, which the database cannot store: 'a\\x00b'",
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
            f"teacher bob: `teachers.model` is '{'m' * 198}…, which cannot be looked up: File name too long",
        ),
        ({"students": {"name": "s"}}, "unknown key 'students' at the top level; did you mean 'student'?"),
    ],
)
def test_a_mistake_in_a_table_is_named_with_its_place(tmp_path: Path, wrong: dict[str, Any], said: str) -> None:
    file = write(tmp_path, **wrong)
    with pytest.raises(UsageError) as refused:
        run_file.read(file)
    assert str(refused.value).startswith(f"{file}: {said}")


def refusal_of_dict(wrong: dict[str, Any]) -> str:
    """What is said of a dict with these tables replaced; a notebook shows no other error before it."""
    with pytest.raises(UsageError) as refused:
        run_file.parse(RIGHT | wrong)
    assert refused.value.__suppress_context__
    return str(refused.value)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (with_run(calibration="16"), "`run.calibration` must be an integer >= 1, got the text '16'"),
        (with_run(calibration=1.5), "`run.calibration` must be an integer >= 1, got 1.5"),
        (with_run(calibration=True), "`run.calibration` must be an integer >= 1, got true"),
        (with_run(seed=None), "`run.seed` must be an integer >= 0 and <= 2147483647, got nothing"),
        (with_run(alpha=1.5), "`run.alpha` must be a number >= 0 and <= 1, got 1.5"),
        (with_run(holdout=1), "`run.holdout` must be a number >= 0 and < 1, got 1"),
        (with_run(setting=None), "`run.setting` is nothing; allowed: 'instruct', 'math'"),
        (with_run(name="a b"), f"`run.name` must be {NAME}, got the text 'a b'"),
        (with_run(name=""), f"`run.name` must be {NAME}, got the text ''"),
        ({"run": 3}, "[run] must be a table, got 3"),
        ({"prompts": ["What?"]}, "[prompts] must be a table, got a list"),
        ({"prompts": {"file": 3}}, "`prompts.file` must be text or a list of texts, got 3"),
        ({"prompts": {"file": ["a", 3]}}, "`prompts.file` (item 2) must be text, got 3"),
        (
            {"prompts": {"file": "a", "source": "a"}},
            "[prompts]: give either file (to be imported) or source (already imported), got both",
        ),
        ({"teachers": {}}, "`teachers` must be a list of tables (with double brackets in TOML), got a table"),
        ({"teachers": ["ada", "bob"]}, "teacher 1: [[teachers]] must be a table, got the text 'ada'"),
        ({"teachers": []}, "a run needs two or more teachers, got 0"),
        ({"teachers": RIGHT["teachers"][:1]}, "a run needs two or more teachers, got 1"),
        (
            with_bob(options={"enforce_eager": "yes"}),
            "teacher bob (vllm): `teachers.options.enforce_eager` must be true or false, got the text 'yes'",
        ),
        (with_bob(params_b="7"), "teacher bob: `teachers.params_b` must be a number > 0, got the text '7'"),
        (with_bob(sampling=[]), "teacher bob: [teachers.sampling] must be a table, got a list"),
        (
            with_bob(sampling={"stop": "\n"}),
            "teacher bob: `teachers.sampling.stop` must be a list of texts, got the text '\\n'",
        ),
        (
            with_bob(few_shot=[{"user": "Hi", "assistant": "Ho"}, {"user": "Hi"}]),
            "teacher bob: 'assistant' is missing in [[teachers.few_shot]] (item 2)",
        ),
        (
            {"teachers": [{"model": "lab/ada"}, *RIGHT["teachers"]]},
            "teacher 1: 'name' is missing in [[teachers]]",
        ),
        (with_bob(name=3), f"teacher 2: `teachers.name` must be {NAME.replace('@ -', '@ / -')}, got 3"),
    ],
)
def test_a_value_of_a_wrong_kind_is_told_in_words_that_fit_a_file_and_a_dict(
    tmp_path: Path, wrong: dict[str, Any], said: str
) -> None:
    assert refusal_of_dict(wrong) == f"the configuration: {said}"
    require_refusal(write(tmp_path, **wrong), said)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (with_bob(temperature=1), "teacher bob: unknown key 'temperature' in [[teachers]]; it belongs in {}"),
        (with_bob(options={"temperature": 1}), "unknown key 'temperature' in [teachers.options]; it belongs in {}"),
        (with_bob(max_tokens=9), "teacher bob: unknown key 'max_tokens' in [[teachers]]; it belongs in {}"),
        ({"temperature": 1}, "unknown key 'temperature' at the top level; it belongs in {}"),
    ],
)
def test_a_key_of_another_table_is_said_to_belong_there(wrong: dict[str, Any], said: str) -> None:
    assert refusal_of_dict(wrong).endswith(said.format("[teachers.sampling]"))


@pytest.mark.parametrize(
    ("wrong", "home"),
    [
        (with_bob(base_url="http://127.0.0.1"), "in [teachers.options]"),
        (with_bob(options={"gpus": 1}), "in [[teachers]]"),
        (with_bob(calibration=3), "in [run]"),
        ({"router": {"epochs": 2}}, "in [router.options]"),
        (with_run(quality={"kind": "math"}), "at the top level"),
    ],
)
def test_where_a_misplaced_key_belongs_is_found_at_every_level(wrong: dict[str, Any], home: str) -> None:
    assert refusal_of_dict(wrong).endswith(f"; it belongs {home}")


def test_a_key_that_several_tables_have_is_answered_with_the_known_ones() -> None:
    assert "unknown key 'kind' in [run]; known keys: name, setting, " in refusal_of_dict(with_run(kind="math"))


def test_a_dict_may_hold_paths_and_numbers_of_other_libraries(tmp_path: Path) -> None:
    numbers = {"calibration": np.int64(16), "alpha": np.float64(0.5)}
    read = run_file.parse(RIGHT | with_run(**numbers) | {"prompts": {"file": [tmp_path / "p.jsonl"]}})
    assert (read.run.calibration, read.run.alpha, read.prompts.files) == (16, 0.5, [str(tmp_path / "p.jsonl")])
    assert refusal_of_dict(with_run(alpha=object())).startswith("the configuration: expected text, numbers, lists and ")
    assert refusal_of_dict({"run": {("a", "b"): 1}}).endswith("dicts whose keys are text")
    assert "teacher bob: `teachers.sampling.stop` (item 1) has a NUL" in refusal_of_dict(
        with_bob(sampling={"stop": ("\0",)})
    )


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
            f"{file}: teacher ada: `teachers.sampling.temperature` is {number}; it must be a finite number"
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


def test_a_control_that_is_not_set_is_no_part_of_a_teachers_version() -> None:
    sampling = Sampling(temperature=0.2)
    # The fields of the first release: versions in stores keep their fingerprints.
    first = {"max_tokens": 1024, "temperature": 0.2, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, "stop": []}

    assert sampling.given() == first
    assert structs.replace(sampling, max_reasoning_tokens=0).given() == {**first, "max_reasoning_tokens": 0}
