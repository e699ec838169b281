"""Save and load a fitted router as safetensors and JSON, without pickle."""

from __future__ import annotations

from pathlib import Path

import msgspec
from msgspec import Struct
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from persyn.errors import HostLacks
from persyn.router.kinds.base import Predictor, Values
from persyn.router.kinds.registry import ROUTERS

_ARRAYS, _VALUES = "kind.safetensors", "kind.json"


class _Saved(Struct, frozen=True, forbid_unknown_fields=True):
    kind: str
    values: Values


def write(folder: Path, kind: str, predictor: Predictor) -> None:
    """Write two files into an existing folder; the same router gives the same bytes."""
    arrays, values = predictor.state()
    save_file({name: arrays[name] for name in sorted(arrays)}, folder / _ARRAYS)
    (folder / _VALUES).write_bytes(msgspec.json.encode(_Saved(kind, values), order="sorted"))


def read(folder: Path) -> tuple[str, Predictor]:
    """The kind and the router of a folder; `HostLacks` if there is none, `UsageError` for an unknown kind."""
    try:
        saved = msgspec.json.decode((folder / _VALUES).read_bytes(), type=_Saved)
        arrays = load_file(folder / _ARRAYS)
    except (OSError, msgspec.MsgspecError, SafetensorError) as error:
        raise HostLacks(f"{str(folder)!r} holds no router: {error}") from error
    return saved.kind, ROUTERS.require(saved.kind, "router").restore(arrays, saved.values)
