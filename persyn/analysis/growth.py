"""The methods of a run in Python by which it grows: more prompts, and more calibration prompts."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from persyn.analysis import extension, recalibration
from persyn.db.connect import Database
from persyn.ingest.prompt_import import PromptFiles
from persyn.runs.recalibration import Choose
from persyn.settings import Settings


class RunGrowth:
    """What adds to a run; a base of `persyn.Run`."""

    _database: Database
    _settings: Settings
    _id: int
    #: Its name, unique in the store.
    name: str

    def extend(self, files: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], *, anyway: bool = False) -> int:
        """Add the prompts of files that are not in the run, which is done or running; then call `work`.

        files:  one or more paths, read as by `persyn prompts import`.
        anyway: also add prompts that are far from the run's calibration prompts.

        The run's router, as it is, assigns them: no calibration response is generated again, and assigned prompts keep
        their teacher. Returns how many prompts were added. Raises `UsageError`, and adds nothing, for a bad row, for a
        run that has failed, is cancelled or paused, and for prompts unlike those that the router was fitted to.
        """
        paths = [files] if isinstance(files, str | os.PathLike) else list(files)
        given = PromptFiles([Path(path) for path in paths])
        tell = extension.Teller(warn)
        distance = extension.measure(self._database, self._id, given, self._settings.home, tell)
        if not anyway:
            extension.require_near(self.name, distance)
        return extension.extend(self._database, self._id, given, distance, tell).made.prompts

    def recalibrate(self, prompts: int, *, choose: Choose = "active") -> int:
        """Add so many of the run's prompts to its calibration prompts; then call `work`, which fits its router again.

        choose: `active` for prompts where the router has learned least, those of extensions first, or `random`.

        All teachers answer these prompts, and prompts without a response are assigned again by the new router. Returns
        how many were added: fewer if no more are left. Raises `UsageError`, and changes nothing, for a run that is
        neither done nor generating, and for one without a router of its own.
        """
        return recalibration.recalibrate(self._database, self._id, prompts, choose).prompts


def warn(text: str) -> None:
    """Warn with the location of the caller's line that called this package."""
    frame, depth = sys._getframe(), 1
    # Code that `exec` runs may have no module name.
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] == "persyn":
        frame, depth = frame.f_back, depth + 1
    warnings.warn(text, stacklevel=depth)
