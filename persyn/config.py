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
from typing import Annotated, Any, Literal, TypeAlias, get_args

import msgspec
from msgspec import Meta, Struct

from persyn.errors import UsageError

Name = Annotated[str, Meta(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9][A-Za-z0-9._:+@-]*$")]
#: The engine of a teacher, and the kind of a scorer, that do nothing here: what they did elsewhere was imported.
IMPORTED = "imported"
#: What a judge runs on.
JudgeEngine: TypeAlias = Literal["vllm", "transformers", "openai", "fake"]
#: A teacher's may be a hub id.
TeacherName = Annotated[str, Meta(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9][A-Za-z0-9._:+@/-]*$")]
#: What a log-likelihood is divided by: "response" is the sum over all its tokens.
Per: TypeAlias = Literal["token", "character", "response"]
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
    #: What makes likelihoods of responses of different lengths comparable.
    learnability_per: Per = "token"
    #: Prompts answered by all teachers, the hold-out included.
    calibration: Positive = 2500
    #: Share of them kept out of the fit, to measure the router.
    holdout: Annotated[float, Meta(ge=0, lt=1)] = 0.1
    seed: Annotated[int, Meta(ge=0, lt=2**31)] = 0
    #: Prompts in one job: what a worker claims at a time.
    job_prompts: Positive = 256


class PromptsTable(_Table, frozen=True):
    """[prompts]: where they come from, one of the two."""

    #: JSONL, JSON, CSV or Parquet, gzipped or not; relative to the run file.
    file: str | list[str] = []
    #: Names of files whose prompts are in the store: `persyn prompts stats` lists them.
    source: str | list[str] = []

    def __post_init__(self) -> None:
        if bool(self.file) == bool(self.source):
            raise ValueError("give either file (to be imported) or source (imported already)")

    @property
    def files(self) -> list[str]:
        """The files to import."""
        return [self.file] if isinstance(self.file, str) else self.file

    @property
    def sources(self) -> list[str]:
        """The names of the files imported already."""
        return [self.source] if isinstance(self.source, str) else self.source


class StudentTable(_Table, frozen=True):
    """[student]: the model the dataset is for."""

    name: Name
    model: str
    revision: str | None = None
    gpus: Count = 0
    #: For the strategy family-strong: one of the teachers' families.
    family: str | None = None
    #: Options of the log_likelihood engine: dtype, batch_tokens, add_bos, response_tokens.
    options: dict[str, Any] = {}
    engine: Literal["log_likelihood", "fake"] = "log_likelihood"


class QualityTable(_Table, frozen=True):
    """[quality]: what makes a response good."""

    kind: Literal["math", "instructions", "reward_model", "judge", "python", "imported", "fake"]
    #: A reward model or a judge; for python a module:function; for imported scores the field they were imported from.
    model: str = ""
    revision: str | None = None
    gpus: Count = 0
    options: dict[str, Any] = {}

    def __post_init__(self) -> None:
        if self.kind == "reward_model" and not self.model:
            raise ValueError("a reward_model needs a model")
        if self.kind == IMPORTED and not self.model:
            raise ValueError("imported scores need model, the field they were imported from")
        if self.kind == "python" and not self.model:
            raise ValueError("a python scorer needs model, a module:function")
        if self.kind == "judge":
            self._require_judge()

    def _require_judge(self) -> None:
        known = get_args(JudgeEngine)
        if not self.model:
            raise ValueError("a judge needs a model")
        if self.options.get("engine") not in known:
            raise ValueError(f"a judge needs options.engine, one of {', '.join(known)}")

    @property
    def is_loaded(self) -> bool:
        """Whether its model is a folder or a hub id, and not what a server or Python knows by that name."""
        return self.kind == "reward_model" or (
            self.kind == "judge" and self.options["engine"] in ("vllm", "transformers")
        )


class RouterTable(_Table, frozen=True):
    """[router]: the model that predicts whose response will be rewarded most."""

    backbone: str = "Qwen/Qwen2.5-1.5B"
    revision: str | None = None
    #: auto: full where that is better than the head by more than chance on prompts kept for it, else head.
    tune: Literal["auto", "full", "lora", "head"] = "auto"
    #: How much each preference counts: by the difference of its rewards, or all the same (the paper's).
    preferences: Literal["weighted", "equal"] = "weighted"
    gpus: Count = 0
    #: Options of the router engines: dtype, epochs, learning_rate, batch_size, max_tokens, ...
    options: dict[str, Any] = {}
    engine: Literal["router", "fake"] = "router"


class StrategyTable(_Table, frozen=True):
    """[strategy]: whom to ask.

    persyn, static and car are decided by the calibration grid, a python function is told it, oracle has every teacher
    answer every prompt, the others need no grid.
    """

    kind: Literal["persyn", "static", "strong", "mix", "family-strong", "car", "random", "oracle", "python"] = "persyn"
    #: mix: the strongest teacher's share; the weakest has the others.
    ratio: Unit = 0.2
    #: car: weight of the student's loss.
    beta: Annotated[float, Meta(ge=0)] = 3.0
    #: `python`: `module:function`, on every worker's `PYTHONPATH`.
    model: str = ""
    #: `python`: `sha256:...` of the function's file; set by PerSyn when the run is started.
    revision: str | None = None
    #: `python`: GPUs it needs; 0 is the CPU.
    gpus: Count = 0
    #: `python`: further arguments of the function.
    options: dict[str, Any] = {}

    def __post_init__(self) -> None:
        if bool(self.model) != (self.kind == "python"):
            raise ValueError("strategy python needs model, a module:function, and no other strategy takes one")

    @property
    def name(self) -> str:
        """What it is called beside others: a function by its own name."""
        return self.model or self.kind


class Shot(_Table, frozen=True):
    """One worked example that a teacher is shown before the prompt."""

    user: str
    assistant: str


class TeacherTable(_Table, frozen=True):
    """[[teachers]]: a model that writes responses. All but the descriptive fields make its version."""

    name: TeacherName
    model: str
    #: imported: it writes nothing here, what it wrote elsewhere was imported.
    engine: Literal["vllm", "transformers", "openai", "imported", "fake"] = "vllm"
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
    strategy: StrategyTable = StrategyTable()

    def __post_init__(self) -> None:
        self._require_strategy()
        if self.run.learnability_per != "token" and "response_tokens" in self.student.options:
            raise ValueError(
                f"learnability_per {self.run.learnability_per} and the student's response_tokens do not go together"
            )
        names = [teacher.name for teacher in self.teachers]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"teachers of the same name: {', '.join(twice)}")

    def _require_strategy(self) -> None:
        kind = self.strategy.kind
        nameless = [teacher.name for teacher in self.teachers if teacher.params_b is None]
        if kind in ("strong", "mix", "family-strong") and nameless:
            raise ValueError(f"strategy {kind} goes by size: give params_b of {', '.join(nameless)}")
        families = {teacher.family for teacher in self.teachers}
        if kind == "family-strong" and (self.student.family is None or self.student.family not in families):
            raise ValueError(
                f"strategy family-strong needs a [student] family that is a teacher's, got {self.student.family}"
            )

    @property
    def n_calibration(self) -> int | None:
        """How many of the prompts every teacher answers, those that measure the router included; None is all."""
        if self.strategy.kind == "oracle":
            return None
        return self.run.calibration if self.strategy.kind in ("persyn", "static", "car", "python") else 0

    @property
    def n_holdout(self) -> int:
        """How many of the calibration prompts measure the router, or the function in its place."""
        is_measured = self.strategy.kind in ("persyn", "python")
        return round(self.run.calibration * self.run.holdout) if is_measured else 0

    def frozen(self) -> dict[str, Any]:
        """The configuration as the store keeps it."""
        built: dict[str, Any] = msgspec.to_builtins(self)
        return built

    def digest(self) -> str:
        """SHA-256 of the configuration; equal files, equal digests."""
        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).hexdigest()


def read(path: Path) -> RunConfig:
    """Read and check a run file, in TOML or JSON; paths in it become absolute, relative to its folder.

    Raises `UsageError` with the place of the first mistake.
    """
    try:
        config = _decoder(path)(path.read_bytes(), type=RunConfig)
    except OSError as error:
        raise UsageError(f"cannot read the run file {path}: {error.strerror}; 'persyn init' writes one") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: {_explain(str(error))}") from error
    return _absolute(config, path.absolute().parent)


def read_teachers(path: Path) -> list[TeacherTable]:
    """The [[teachers]] of a TOML or JSON file, which may be a run file and need not.

    In such a list a teacher's engine is "imported" and its model its name, unless said otherwise.
    Raises `UsageError` with the place of the first mistake.
    """
    try:
        found = _decoder(path)(path.read_bytes(), type=_TeachersFile).teachers
        tables = [{"engine": IMPORTED, "model": table.get("name"), **table} for table in found]
        teachers = msgspec.convert(tables, list[TeacherTable])
    except OSError as error:
        raise UsageError(f"cannot read the teachers' file {path}: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: {_explain(str(error).replace('$[', '$.teachers['))}") from error
    return [_absolute_teacher(teacher, path.absolute().parent) for teacher in teachers]


def _decoder(path: Path) -> Any:
    return msgspec.json.decode if path.suffix.lower() == ".json" else msgspec.toml.decode


class _TeachersFile(Struct, frozen=True):
    """Whatever else it holds."""

    teachers: list[dict[str, Any]]


def thaw(frozen: dict[str, Any]) -> RunConfig:
    """The configuration of a stored run."""
    return msgspec.convert(frozen, RunConfig)


def _absolute(config: RunConfig, folder: Path) -> RunConfig:
    """Paths that are there become absolute."""
    files = [str((folder / Path(file).expanduser()).resolve()) for file in config.prompts.files]
    quality, is_path = config.quality.model, config.quality.is_loaded
    replace = msgspec.structs.replace
    return replace(
        config,
        prompts=replace(config.prompts, file=files),
        student=replace(config.student, model=_local(config.student.model, folder)),
        quality=replace(config.quality, model=_local(quality, folder) if is_path else quality),
        router=replace(config.router, backbone=_local(config.router.backbone, folder)),
        teachers=[_absolute_teacher(teacher, folder) for teacher in config.teachers],
    )


def _absolute_teacher(teacher: TeacherTable, folder: Path) -> TeacherTable:
    lies_elsewhere = teacher.engine in ("openai", IMPORTED)
    return teacher if lies_elsewhere else msgspec.structs.replace(teacher, model=_local(teacher.model, folder))


def _local(model: str, folder: Path) -> str:
    """A path that is there, absolute; what is no local path is a hub id and stays."""
    looks_local = model.startswith((".", "/", "~"))
    path = (folder / Path(model).expanduser()).resolve()
    return str(path) if model and (looks_local or path.is_dir()) else model


def _explain(message: str) -> str:
    """msgspec's message, with the nearest known key when one was mistyped."""
    unknown = re.search(r"unknown field `([^`]+)`(?: - at `\$\.?([^`]*)`)?", message)
    missing = re.fullmatch(r"Object missing required field `([^`]+)`(?: - at `\$\.?([^`]*)`)?", message)
    if missing and missing[2]:
        return f"{missing[1]!r} is missing in [{missing[2]}]"
    if missing:
        return f"[{missing[1]}] is missing; 'persyn init' writes a file that has all it needs"
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
        "strategy": StrategyTable,
        "teachers": TeacherTable,
        "teachers.sampling": Sampling,
        "teachers.few_shot": Shot,
    }
    return tables[place].__struct_fields__ if place in tables else ()
