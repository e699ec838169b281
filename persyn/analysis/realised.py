"""The quality of each teacher's responses, beside what its calibration responses predicted."""

from __future__ import annotations

from typing import Any

import numpy as np
from msgspec import Struct
from sqlalchemy import Select, and_, func, select, union
from sqlalchemy.orm import Session

from persyn.analysis import charts
from persyn.analysis.charts import ControlChart
from persyn.config import load_config
from persyn.db import lookup
from persyn.db.catalog import Role, Run, RunPrompt
from persyn.db.grid import Grid
from persyn.db.results import Assignment, Fallback, Response, Score
from persyn.method import intervals
from persyn.method.intervals import Interval, Sample
from persyn.stages import drift

#: With fewer responses, predicted or realised, a teacher is not said to be worse.
_ENOUGH = 20


class Realised(Struct, frozen=True):
    """The mean quality of one teacher's first choices, in the quality's unit.

    predicted: of its responses to the calibration prompts that it would be chosen for; None if there are none.
    is_alike:  whether those are prompts like the ones that it was given. Limits, and functions, choose prompts in a way
               that calibration prompts cannot show.
    chart:     None where responses are not watched as they come, or nothing predicts them.
    """

    teacher: str
    predicted: Sample | None
    realised: Sample
    is_alike: bool = True
    chart: ControlChart | None = None

    @property
    def difference(self) -> Interval | None:
        """How far the realised quality is above the predicted one."""
        return None if self.predicted is None else intervals.difference(self.realised, self.predicted)

    @property
    def difference_words(self) -> str:
        """The difference and its interval; a dash where it is not known."""
        if self.predicted is None or self.difference is None or min(self.predicted.n, self.realised.n) < 2:
            return "-"
        return f"{self.difference.mean:+.3f} ({self.difference.low:+.3f} to {self.difference.high:+.3f})"

    @property
    def is_worse(self) -> bool:
        """Whether its responses are clearly worse than predicted."""
        if self.predicted is None or self.difference is None or min(self.predicted.n, self.realised.n) < _ENOUGH:
            return False
        return self.is_alike and self.difference.high < 0

    @property
    def warning(self) -> str | None:
        """What to know of a teacher that is worse than predicted."""
        alarm = None if self.chart is None else self.chart.alarm
        return alarm or (self.says if self.is_worse else None)

    @property
    def says(self) -> str:
        """The comparison in words."""
        was = "-" if self.predicted is None else f"{self.predicted.mean:.3f}"
        return (
            f"the quality of {self.teacher}'s responses is {self.realised.mean:.3f}, and its calibration responses "
            f"predicted {was}: difference {self.difference_words}"
        )


def figures(found: Sample | None) -> tuple[float | None, int]:
    """A mean and the number of values behind it."""
    return (None, 0) if found is None else (found.mean, found.n)


def of_run(session: Session, run: Run, cells: Grid) -> list[Realised]:
    """The teachers with scored responses to target prompts, in head order; empty unless these are scored as they come.

    Of several samples, the first counts, and responses that [fallback] left count as well: a choice among responses
    would make a teacher look better than it is.
    """
    generation = load_config(run.config).generation
    if not (generation.check or generation.is_choice):
        return []
    is_chosen, is_alike = drift.chosen(session, run, cells)
    found = {
        teacher_id: _sample(mean, square, count) for teacher_id, mean, square, count in session.execute(_scored(run))
    }
    predicted = (
        quality[chosen & ~np.isnan(quality)] for quality, chosen in zip(cells.quality.T, is_chosen.T, strict=True)
    )
    pairs = zip(lookup.teachers(session, run.id), map(intervals.sample, predicted), strict=True)
    watched = charts.of_run(session, run)
    return [
        Realised(teacher.name, was, found[teacher.id], is_alike, watched.get(teacher.name))
        for teacher, was in pairs
        if teacher.id in found
    ]


def _sample(mean: float, square: float, count: int) -> Sample:
    variance = max(0.0, square - mean**2) * count / (count - 1) if count > 1 else np.nan
    return Sample(float(mean), variance, int(count))


def _scored(run: Run) -> Select[Any]:
    """Select each teacher's mean quality and mean squared quality over the target prompts that it was chosen for."""
    first = union(
        *(
            select(of.prompt_id, of.teacher_id).where(of.run_id == run.id, of.choice == 1)
            for of in (Assignment, Fallback)
        )
    ).subquery()
    is_of = and_(Response.prompt_id == first.c.prompt_id, Response.teacher_id == first.c.teacher_id)
    return (
        select(first.c.teacher_id, func.avg(Score.value), func.avg(Score.value * Score.value), func.count())
        .join(RunPrompt, and_(RunPrompt.run_id == run.id, RunPrompt.prompt_id == first.c.prompt_id))
        .join(Response, and_(is_of, Response.sample == 0))
        .join(Score, and_(Score.response_id == Response.id, Score.scorer_id == run.quality_scorer_id))
        .where(RunPrompt.role == Role.TARGET, Score.value.is_not(None))
        .group_by(first.c.teacher_id)
    )
