"""The control charts of a run's teachers, in words and as points of a figure."""

from __future__ import annotations

from msgspec import Struct
from sqlalchemy import select
from sqlalchemy.orm import Session

from persyn.config import load_config
from persyn.db.catalog import Run, Teacher
from persyn.db.results import Chart, ChartPoint
from persyn.method import control_chart
from persyn.method.control_chart import Design
from persyn.stages import drift


class ControlChart(Struct, frozen=True):
    """A teacher's control chart, the last one where it was started anew.

    expected:  the mean quality that the calibration responses predict at least.
    responses: how many were on the chart at each point.
    statistic: as a share of the limit; 1 or more is the alarm.
    alarm:     what was predicted and what came, if it was raised.
    """

    teacher: str
    expected: float
    responses: list[int]
    statistic: list[float]
    alarm: str | None = None

    @property
    def words(self) -> str:
        """Its state."""
        if self.alarm is not None:
            return "alarm"
        return f"{self.statistic[-1]:.0%} of limit" if self.statistic else "empty"


def of_run(session: Session, run: Run) -> dict[str, ControlChart]:
    """The charts by teacher; empty unless a run keeps them."""
    is_stop = load_config(run.config).generation.when_worse == "stop"
    over = "; it is not asked any more" if is_stop else ""
    alarms = {alarm.teacher: f"{alarm.says}{over}" for alarm in drift.alarms(session, run)}
    charts = select(Chart, Teacher.name).join(Teacher, Teacher.id == Chart.teacher_id).where(Chart.run_id == run.id)
    found: dict[str, ControlChart] = {}
    for chart, name in session.execute(charts.order_by(Chart.id)):
        columns = select(ChartPoint.responses, ChartPoint.statistic).where(ChartPoint.chart_id == chart.id)
        points = session.execute(columns.order_by(ChartPoint.id)).all()
        found[name] = ControlChart(
            name,
            drift.read(chart, Design).expected,
            [point.responses for point in points],
            [point.statistic / control_chart.LIMIT for point in points],
            alarms.get(name),
        )
    return found
