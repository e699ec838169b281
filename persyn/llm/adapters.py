"""LoRA adapters: where their files are, and whether they fit a base model.

An adapter is named by its folder, or by its hub id, with "@" and a commit. Loads no model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from persyn.errors import PermanentError, UsageError
from persyn.llm.identity import adapter_folder, hub_revision, snapshot_in_cache
from persyn.llm.protocols import Finding, ModelSpec

_PREFIX = "base_model.model."
_PARTS = (".lora_A.weight", ".lora_B.weight")
_WEIGHTS = "adapter_model.safetensors"


class AdapterConfig(Struct, frozen=True):
    """What is read of `adapter_config.json`; its other fields are the engine's."""

    peft_type: str
    r: int
    base_model_name_or_path: str | None = None
    rank_pattern: dict[str, int] | None = None

    @property
    def rank(self) -> int:
        """The highest rank of a module."""
        return max([self.r, *(self.rank_pattern or {}).values()])


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter whose files are on this host."""

    name: str
    folder: Path
    config: AdapterConfig


def name_of(adapter: str | None, revision: str | None) -> str | None:
    """The name of an adapter in a `ModelSpec` and a `Generate`; None for a teacher without one.

    revision: as returned by `identity.identify_adapter`.
    """
    commit = hub_revision(revision)
    return f"{adapter}@{commit}" if adapter and commit else adapter


def find(spec: ModelSpec) -> dict[str, Adapter]:
    """The adapters of a model by name; `PermanentError` if one is missing, is no LoRA, or does not fit the model."""
    return {name: _find(name, spec) for name in spec.adapters}


def _find(name: str, spec: ModelSpec) -> Adapter:
    adapter, _, revision = (name, "", "") if Path(name).is_dir() else name.partition("@")
    try:
        found = read(name, adapter_folder(adapter, revision or None))
        flaw = misfit(found, base_folder(spec))
    except UsageError as error:
        raise PermanentError(str(error)) from error
    if flaw:
        raise PermanentError(f"the adapter {name!r} does not fit {spec.model!r}: {flaw}")
    return found


def read(name: str, folder: Path) -> Adapter:
    """An adapter in a folder; `UsageError` if its configuration is not that of a LoRA."""
    try:
        config = msgspec.json.decode((folder / "adapter_config.json").read_bytes(), type=AdapterConfig)
    except (OSError, msgspec.DecodeError) as error:
        raise UsageError(f"the adapter {name!r} has no valid adapter_config.json: {error}") from error
    if config.peft_type != "LORA":
        raise UsageError(f"the adapter {name!r} is of type {config.peft_type}; only LORA can be used")
    return Adapter(name, folder, config)


def base_folder(spec: ModelSpec) -> Path | None:
    """The folder with a base model's weights on this host; None if they are not here."""
    folder = Path(spec.model)
    return folder if folder.is_dir() else snapshot_in_cache(spec.model, spec.revision)


def misfit(adapter: Adapter, base: Path | None) -> str:
    """Why an adapter was not made for a model of this form; empty if it may have been, or if that is unknown.

    vLLM itself would use an adapter that is too small or has too many layers, without a word.
    """
    shapes = dict(_shapes(base.glob("*.safetensors"))) if base is not None else {}
    kinds = {_kind(name) for name in shapes}
    for name, (rows, columns) in _shapes([adapter.folder / _WEIGHTS]):
        part = next((part for part in _PARTS if name.endswith(part)), None)
        if part is None:
            continue
        module = name.removeprefix(_PREFIX).removesuffix(part)
        weight = f"{module}.weight"
        found = shapes.get(weight) or shapes.get(weight.partition(".")[2])
        size = columns if part == _PARTS[0] else rows
        if found is None:
            if _kind(weight) in kinds:  # else the checkpoint has other names than the model
                return f"it has weights for {module}, which the model does not have"
        # Some layers store their weight transposed, as in GPT-2.
        elif size not in found:
            return f"its weights for {module} are for a width of {size:,}; the model's have {found[0]:,} x {found[1]:,}"
    return ""


def _kind(name: str) -> str:
    """The last parts of a weight's name: "q_proj.weight"."""
    return ".".join(name.rsplit(".", 2)[-2:])


def _shapes(files: Any) -> Iterator[tuple[str, tuple[int, int]]]:
    """The names and shapes of the matrices in safetensors files."""
    from safetensors import SafetensorError, safe_open

    for file in files:
        try:
            with safe_open(file, framework="numpy") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a mapping
                    shape = opened.get_slice(name).get_shape()
                    if len(shape) == 2:
                        yield name, (shape[0], shape[1])
        except (OSError, SafetensorError) as error:
            raise UsageError(f"{file} is not a safetensors file: {error}") from error


def look_over(adapter: Adapter, model: str) -> Finding:
    """What a user should know about an adapter that fits the model."""
    base = adapter.config.base_model_name_or_path
    if base and Path(base).name != Path(model).name:
        return Finding("warning", "adapter", f"the adapter {adapter.name!r} was made for {base!r}, not for {model!r}")
    return Finding("ok", "adapter", f"the adapter {adapter.name!r} has the rank {adapter.config.rank}")


def largest_rank(adapters: Mapping[str, Adapter]) -> int:
    """The highest rank of some adapters."""
    return max(adapter.config.rank for adapter in adapters.values())
