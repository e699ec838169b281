"""Draw the control charts of a run's teachers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from persyn.analysis.charts import ControlChart
from persyn.report.drawing import Picture, label, laid_out, styled
from persyn.report.facts import Report


def of(report: Report) -> list[ControlChart]:
    """The charts that have points."""
    return [each.chart for each in report.facts.realised if each.chart is not None and each.chart.responses]


def draw(charts: Sequence[ControlChart], *, colours: Mapping[str, str]) -> Picture:
    """The evidence against each teacher; those that became worse are named at the end of their line."""
    with styled():
        figure = Figure(figsize=(5.2, 2.8), layout="constrained")
        axes = figure.subplots()
        axes.grid(True)
        axes.axhline(1, color=colours["red"], linestyle=":")
        for chart in charts:
            color = colours["grey" if chart.alarm is None else "red"]
            axes.plot([0, *chart.responses], [0, *chart.statistic], color=color, linewidth=1.4)
            if chart.alarm is not None:
                end = chart.responses[-1], chart.statistic[-1]
                axes.annotate(label(chart.teacher), end, (0, 4), textcoords="offset points", ha="right", color=color)
        axes.set_ylim(0, max(1.15, *(1.15 * max(chart.statistic) for chart in charts)))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_xlabel("a teacher's responses that were scored, in order")
        axes.set_ylabel("of the limit")
    said = [f"{chart.teacher}: {chart.words} after {chart.responses[-1]:,} responses" for chart in charts]
    return laid_out(Picture("control-charts", "Evidence that a teacher became worse", f"{'; '.join(said)}.", figure))
