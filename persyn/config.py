"""A run's file: TOML, checked strictly, frozen.

Every key is a field below; a key that is no field is an error, so that a typing mistake
cannot pass for a default.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from persyn.errors import UsageError

Name = Annotated[str, Meta(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9][A-Za-z0-9._:+@-]*$")]
Unit = Annotated[float, Meta(ge=0, le=1)]
Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]


class _Table(Struct, frozen=True, forbid_unknown_fields=True):
    """A table of the file."""


class Sampling(_Table, frozen=True):
    """How a response is drawn. `max_tokens` always bounds it."""

    max_tokens: Positive = 1024
    #: 0 is greedy.
    temperature: Annotated[float, Meta(ge=0)] = 0.7
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    #: 0 considers every token.
    top_k: Count = 0
    repetition_penalty: Annotated[float, Meta(gt=0)] = 1.0
    #: Texts that end a response; they are not part of it.
    stop: list[str] = []


class RunTable(_Table, frozen=True):
    """[run]: its name, and the dials of the method."""

    name: Name
    #: math: quality is the correctness of the final answer; instruct: quality is a reward model's.
    setting: Literal["math", "instruct"]
    #: Weight of learnability; the rest is quality's.
    alpha: Unit = 0.4
    #: How raw scores are made comparable within a prompt.
    normalise: Literal["minmax", "zscore", "rank"] = "minmax"
    #: Prompts answered by all teachers, the hold-out included.
    calibration: Positive = 2500
    #: Share of them kept out of the fit, to measure the router.
    holdout: Annotated[float, Meta(ge=0, lt=1)] = 0.1
    seed: Annotated[int, Meta(ge=0, lt=2**31)] = 0
    #: Prompts in one job: what a worker claims at a time.
    job_prompts: Positive = 256


class PromptsTable(_Table, frozen=True):
    """[prompts]: where they come from."""

    #: JSONL, JSON, CSV or Parquet, gzipped or not; relative to the run file.
    file: str | list[str]


class StudentTable(_Table, frozen=True):
    """[student]: the model the dataset is for."""

    name: Name
    model: str
    revision: str | None = None
    gpus: Count = 0
    #: Options of the log_likelihood engine: dtype, batch_tokens, add_bos.
    options: dict[str, Any] = {}
    engine: Literal["log_likelihood", "fake"] = "log_likelihood"


class QualityTable(_Table, frozen=True):
    """[quality]: what makes a response good."""

    kind: Literal["math", "reward_model", "fake"]
    model: str = ""
    revision: str | None = None
    gpus: Count = 0
    options: dict[str, Any] = {}

    def __post_init__(self) -> None:
        if self.kind == "reward_model" and not self.model:
            raise ValueError("a reward_model needs a model")


class RouterTable(_Table, frozen=True):
    """[router]: the model that predicts whose response will be rewarded most."""

    backbone: str = "Qwen/Qwen2.5-1.5B"
    revision: str | None = None
    tune: Literal["full", "lora", "head"] = "full"
    gpus: Count = 0
    #: Options of the router engines: dtype, epochs, learning_rate, batch_size, max_tokens, ...
    options: dict[str, Any] = {}
    engine: Literal["router", "fake"] = "router"


class Shot(_Table, frozen=True):
    """One worked example that a teacher is shown before the prompt."""

    user: str
    assistant: str


class TeacherTable(_Table, frozen=True):
    """[[teachers]]: a model that writes responses. All but the descriptive fields make its version."""

    name: Name
    model: str
    engine: Literal["vllm", "transformers", "openai", "fake"] = "vllm"
    revision: str | None = None
    gpus: Count = 1
    #: The engine's own arguments: dtype, max_model_len, base_url, api_key_env, concurrency, ...
    options: dict[str, Any] = {}
    sampling: Sampling = Sampling()
    system: str | None = None
    few_shot: list[Shot] = []
    # Descriptive: they may change without making another teacher.
    family: str | None = None
    license: str | None = None
    params_b: Annotated[float, Meta(gt=0)] | None = None
    price_in: Annotated[float, Meta(ge=0)] | None = None
    price_out: Annotated[float, Meta(ge=0)] | None = None


class RunConfig(_Table, frozen=True):
    """The whole file."""

    run: RunTable
    prompts: PromptsTable
    student: StudentTable
    quality: QualityTable
    teachers: Annotated[list[TeacherTable], Meta(min_length=2)]
    router: RouterTable = RouterTable()

    def __post_init__(self) -> None:
        names = [teacher.name for teacher in self.teachers]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"teachers of the same name: {', '.join(twice)}")

    @property
    def n_holdout(self) -> int:
        """How many of the calibration prompts measure the router."""
        return round(self.run.calibration * self.run.holdout)

    def frozen(self) -> dict[str, Any]:
        """The configuration as the store keeps it."""
        built: dict[str, Any] = msgspec.to_builtins(self)
        return built

    def digest(self) -> str:
        """SHA-256 of the configuration; equal files, equal digests."""
        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).hexdigest()


def read(path: Path) -> RunConfig:
    """Read and check a run file; paths in it become absolute, relative to its folder.

    Raises `UsageError` with the place of the first mistake.
    """
    try:
        config = msgspec.toml.decode(path.read_bytes(), type=RunConfig)
    except OSError as error:
        raise UsageError(f"cannot read the run file {path}: {error.strerror}; 'persyn init' writes one") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: {_explain(str(error))}") from error
    return _absolute(config, path.absolute().parent)


def thaw(frozen: dict[str, Any]) -> RunConfig:
    """The configuration of a stored run."""
    return msgspec.convert(frozen, RunConfig)


def _absolute(config: RunConfig, folder: Path) -> RunConfig:
    """Paths that are there become absolute; what is no local path is a hub id and stays."""

    def local(model: str) -> str:
        looks_local = model.startswith((".", "/", "~"))
        path = (folder / Path(model).expanduser()).resolve()
        return str(path) if model and (looks_local or path.is_dir()) else model

    files = [config.prompts.file] if isinstance(config.prompts.file, str) else config.prompts.file
    replace = msgspec.structs.replace
    return replace(
        config,
        prompts=replace(config.prompts, file=[str((folder / Path(f).expanduser()).resolve()) for f in files]),
        student=replace(config.student, model=local(config.student.model)),
        quality=replace(config.quality, model=local(config.quality.model)),
        router=replace(config.router, backbone=local(config.router.backbone)),
        teachers=[t if t.engine == "openai" else replace(t, model=local(t.model)) for t in config.teachers],
    )


def _explain(message: str) -> str:
    """msgspec's message, with the nearest known key when one was mistyped."""
    unknown = re.search(r"unknown field `([^`]+)`(?: - at `\$\.?([^`]*)`)?", message)
    if not unknown:
        return message.replace("Object", "the table").replace("`$.", "`").replace("`$`", "the top of the file")
    key, place = unknown[1], re.sub(r"\[\d*\.*\]", "", unknown[2] or "")
    known = list(_fields(place))
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known are: {', '.join(known)}"
    return f"unknown key {key!r} in {f'[{place}]' if place else 'the file'}; {hint}"


def _fields(place: str) -> Iterable[str]:
    """The keys of the table at a dotted place."""
    tables: dict[str, type[Struct]] = {
        "": RunConfig,
        "run": RunTable,
        "prompts": PromptsTable,
        "student": StudentTable,
        "quality": QualityTable,
        "router": RouterTable,
        "teachers": TeacherTable,
        "teachers.sampling": Sampling,
        "teachers.few_shot": Shot,
    }
    return tables[place].__struct_fields__ if place in tables else ()
