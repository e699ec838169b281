"""The content of figures, and that they are safe to embed."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import matplotlib
import msgspec
import pytest
from PIL import Image

from persyn.analysis.charts import ControlChart
from persyn.analysis.summary import TeacherFacts
from persyn.method.routing_metrics import Believed
from persyn.report import control_charts, drawing, figures
from persyn.report.drawing import Picture
from persyn.report.facts import Report

TEACHERS = [
    TeacherFacts(teacher=name, assigned=n, quality=None, learnability=None, reward=None, tokens=0)
    for name, n in (("ada", 1), ("bob", 3))
]
_SVG = "{http://www.w3.org/2000/svg}"
_ELEMENTS = {"svg", "title", "desc", "defs", "g", "path", "use", "text", "tspan", "clipPath", "rect"}


def texts(picture: Picture) -> list[str]:
    return [text.text or "" for text in ElementTree.fromstring(drawing.svg(picture)).iter(f"{_SVG}text")]


def test_shares_are_bars_in_order_with_real_text() -> None:
    picture = figures.teacher_shares(TEACHERS)

    bars = [patch for patch in picture.figure.axes[0].patches if patch.get_width()]  # type: ignore[attr-defined]
    assert [bar.get_width() for bar in bars] == [3, 1]  # type: ignore[attr-defined]
    assert [text for text in texts(picture) if text in ("ada", "bob", "3 (75%)", "1 (25%)")] == [
        "bob",
        "ada",
        "3 (75%)",
        "1 (25%)",
    ]
    assert picture.says == "Of 4 prompts: bob 75%, ada 25%."


def test_every_fact_of_a_run_is_drawn_and_told_in_words(pictures: list[Picture]) -> None:
    # The learning curve is drawn only on request, and this run does not check responses as they come.
    others = {"router-curve", "control-charts"}
    assert [picture.name for picture in pictures] == [name for name in figures.FIGURES if name not in others]
    said = {picture.name: picture.says for picture in pictures}
    assert said["hit-rates"] == "Hit@1: router 75%, static 50%, random 50%."
    assert said["savings"] == "This run, response tokens: 190 of about 240; US dollars: $0.0032 of about $0.004."
    assert all(picture.figure.axes[0].get_xlabel() for picture in pictures if picture.name != "progress")


def test_a_control_chart_names_the_teachers_that_became_worse() -> None:
    charts = [ControlChart("ada", 0.7, [8, 16], [0.2, 0.0]), ControlChart("$bob$", 0.7, [8, 16], [0.4, 1.1], "worse")]

    picture = control_charts.draw(charts, colours=figures.COLOURS)

    assert picture.says == "ada: 0% of limit after 16 responses; $bob$: alarm after 16 responses."
    assert "$bob$" in texts(picture)
    assert "ada" not in texts(picture)


def test_a_router_curve_shows_each_size_beside_its_baselines() -> None:
    points = [SimpleNamespace(n_calibration=n, reward=r, deviation=0.1, static=0.5) for n, r in ((25, 0.4), (100, 0.6))]
    curve: Any = SimpleNamespace(points=points, oracle=0.9, verdict="more may help", n_holdout=9)

    picture = figures.router_curve(curve)

    lines = {line.get_label(): list(line.get_ydata()) for line in picture.figure.axes[0].lines}
    assert (lines["router"], lines["best single teacher"]) == ([0.4, 0.6], [0.5, 0.5])
    assert {"25", "100"} <= set(texts(picture))
    assert picture.says.endswith("the oracle 0.900. More may help.")


def test_how_far_a_win_probability_can_be_believed_is_shown_with_how_many_it_is_of() -> None:
    picture = figures.reliability([Believed(0.6, 1.0, 1, 0.5), Believed(0.9, 0.8, 1200, 300.0)])
    assert {"1", "1,200"} <= set(texts(picture))
    # Only the diagonal is a line: a single point is no trend.
    assert [line.get_label() for line in picture.figure.axes[0].lines] == ["as predicted"]


def test_hostile_names_stay_text(drawn: dict[str, str]) -> None:
    for name, svg in drawn.items():
        root = ElementTree.fromstring(svg)
        assert {element.tag.removeprefix(_SVG) for element in root.iter()} <= _ELEMENTS, name
        for element in root.iter():
            assert not [key for key in element.attrib if key.startswith("on")], name
            assert element.get("href", "#").startswith("#")
    assert ">&lt;script&gt;alert(1)&lt;/script&gt;</text>" in drawn["teacher-shares"]


def test_a_dollar_sign_is_no_mathematics() -> None:
    price = [TeacherFacts(teacher="$x^2$", assigned=1, quality=None, learnability=None, reward=None, tokens=0)]
    assert "$x^2$" in texts(figures.teacher_shares(price))


def test_a_page_may_hold_all_figures_and_no_id_twice(drawn: dict[str, str]) -> None:
    ids: list[str] = []
    for name, svg in drawn.items():
        root = ElementTree.fromstring(svg)
        mine = [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
        used = [element.attrib["href"] for element in root.iter() if "href" in element.attrib]
        assert {f"#{one}" for one in mine} >= set(used)
        assert (root.get("role"), root.get("aria-labelledby")) == (
            "img",
            f"{name}-title {name}-desc",
        )
        ids += mine
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(
    ("ink", "has", "lacks"),
    [
        ("page", "currentColor", "prefers-color-scheme"),
        ("scheme", "prefers-color-scheme:dark", "#1b1c1f;"),
        ("paper", "#1b1c1f", "currentColor"),
    ],
)
def test_text_has_the_readers_colour(ink: drawing.Ink, has: str, lacks: str) -> None:
    drawn = drawing.svg(figures.teacher_shares(TEACHERS), ink=ink)
    assert has in drawn
    assert lacks not in drawn


def test_the_same_facts_are_the_same_bytes_in_every_thread_and_settings_stay(report: Report) -> None:
    before = dict(matplotlib.rcParams)
    assert report.alphas is not None
    alphas = report.alphas

    def draw(_: int) -> str:
        return drawing.svg(figures.alpha_winners(alphas))

    with ThreadPoolExecutor(4) as threads:
        drawn = set(threads.map(draw, range(4)))
    assert len(drawn) == 1
    assert dict(matplotlib.rcParams) == before


def test_a_png_is_on_white_ground() -> None:
    picture = figures.teacher_shares(TEACHERS)
    drawn = drawing.png(picture)
    assert drawn == drawing.png(picture)
    assert Image.open(io.BytesIO(drawn)).convert("RGBA").getpixel((0, 0)) == (255, 255, 255, 255)


def test_a_picture_that_is_saved_again_is_the_same() -> None:
    wide = [msgspec.structs.replace(teacher, teacher=teacher.teacher * 12, assigned=3000) for teacher in TEACHERS]
    picture = figures.teacher_shares(wide)
    assert drawing.svg(picture) == drawing.svg(picture)
