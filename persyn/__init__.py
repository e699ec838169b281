"""PerSyn: route each prompt to the teacher whose answers suit a student best, then generate.

    import persyn

    with persyn.open() as store:
        run = store.start("run.toml").work()
        rewards = run.rewards().to_pandas()

Start with `persyn.open`. The names of this module are imported on first use, so that `import persyn`
loads nothing else.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from persyn.api import ExportedDataset as ExportedDataset
    from persyn.api import ExportOptions as ExportOptions
    from persyn.api import Figure as Figure
    from persyn.api import PilotSettings as PilotSettings
    from persyn.api import Plan as Plan
    from persyn.api import Progress as Progress
    from persyn.api import Run as Run
    from persyn.api import RunState as RunState
    from persyn.api import RunVerdict as RunVerdict
    from persyn.api import Snapshot as Snapshot
    from persyn.api import Store as Store
    from persyn.api import Summary as Summary
    from persyn.api import TrainingSettings as TrainingSettings
    from persyn.api import open as open
    from persyn.errors import EngineError as EngineError
    from persyn.errors import PersynError as PersynError
    from persyn.errors import UsageError as UsageError
    from persyn.operations.copying import StoreCopy as StoreCopy
    from persyn.operations.copying import copy_store as copy_store
    from persyn.operations.deletion import Deletion as Deletion

    #: The installed version.
    __version__: str

#: What is offered, and where it is defined.
_OFFERED = {
    **dict.fromkeys(
        (
            "open",
            "Store",
            "Run",
            "Figure",
            "ExportOptions",
            "ExportedDataset",
            "PilotSettings",
            "Plan",
            "Progress",
            "RunState",
            "RunVerdict",
            "Snapshot",
            "Spending",
            "Summary",
            "TrainingSettings",
        ),
        "persyn.api",
    ),
    **dict.fromkeys(("copy_store", "StoreCopy"), "persyn.operations.copying"),
    "Deletion": "persyn.operations.deletion",
    **dict.fromkeys(("PersynError", "UsageError", "EngineError"), "persyn.errors"),
}

__all__ = ["__version__", *_OFFERED]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        found: Any = version("persyn")
    elif name in _OFFERED:
        found = getattr(import_module(_OFFERED[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
