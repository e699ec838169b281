"""A figure as a reader gets it: as SVG with real text, or as PNG. Knows nothing of what it shows.

A figure is transparent and keeps to colours that are told apart on light and on dark ground, and by the
colour-blind. What its texts say is hostile: it is never read as mathematics or as markup.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import RLock
from typing import Literal, TypeAlias
from xml.etree import ElementTree

import matplotlib.style
from matplotlib.figure import Figure

#: What text and lines are drawn in. In an SVG it becomes the reader's own colour.
INK = "#1b1c1f"
_INK_DARK = "#e7e7ea"
_STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "axes.formatter.useoffset": False,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "grid.alpha": 0.16,
    "grid.color": INK,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "persyn",
    "text.color": INK,
    # A dollar sign in a name is a dollar sign.
    "text.parse_math": False,
    "xtick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.color": INK,
    "ytick.major.width": 0.6,
}
#: matplotlib has its settings in one place for all threads.
_ONE_AT_A_TIME = RLock()
_SVG = "{http://www.w3.org/2000/svg}"
_LINK = "{http://www.w3.org/1999/xlink}href"

Ink: TypeAlias = Literal["page", "scheme", "paper"]
"""Whose colour an SVG's text has: the page's that it is part of, one that follows the reader's light or dark
scheme (for an image of its own), or black (for print)."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure with what is said of it.

    name: of its file, without an ending. title: what it shows. says: what is seen in it, for those who see it not.
    """

    name: str
    title: str
    says: str
    figure: Figure


def svg(picture: Picture, *, ink: Ink = "page") -> str:
    """One `<svg>` element with real text; the same picture gives the same text. Safe to be put into an HTML page."""
    buffer = io.BytesIO()
    with styled():
        picture.figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    return _mended(buffer.getvalue(), picture, ink)


def png(picture: Picture) -> bytes:
    """A PNG on white ground, for print: 200 dots per inch."""
    buffer = io.BytesIO()
    with styled():
        picture.figure.savefig(buffer, format="png", dpi=200, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def laid_out(picture: Picture) -> Picture:
    """Lay the figure out, once: laid out again each time it is saved, it would not come out the same."""
    with styled():
        picture.figure.draw_without_rendering()
        picture.figure.set_layout_engine("none")
    return picture


def label(text: str, *, most: int = 26) -> str:
    """A name that fits beside an axis: on one line, printable, its middle left out where it is long."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= most else f"{line[: most // 3]}…{line[len(line) - (most - most // 3 - 1) :]}"


@contextmanager
def styled() -> Iterator[None]:
    """Our settings and nobody else's, for one thread at a time."""
    with _ONE_AT_A_TIME, warnings.catch_warnings(), matplotlib.style.context(["default", _STYLE]):
        # The reader's browser has more letters than the font that text is measured with.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def _mended(drawn: bytes, picture: Picture, ink: Ink) -> str:
    """What matplotlib wrote, made fit for a page: sized by it, told in words, its ids its own, in its colour."""
    root = ElementTree.fromstring(drawn)  # noqa: S314 - it was written a moment ago, by matplotlib
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{_SVG}metadata", f"{_SVG}style"):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        _rename(element, picture.name)
        if style := element.get("style"):
            element.set("style", _restyled(style, ink))
    root.attrib = {
        "xmlns": _SVG.strip("{}"),
        "viewBox": root.attrib["viewBox"],
        "role": "img",
        "aria-labelledby": f"{picture.name}-title {picture.name}-desc",
        "font-family": "system-ui, 'DejaVu Sans', sans-serif",
        "stroke-linejoin": "round",
    }
    _tell(root, picture, ink)
    return ElementTree.tostring(root, encoding="unicode")


def _rename(element: ElementTree.Element, name: str) -> None:
    """Ids are of the whole page that a figure is part of."""
    for key, value in list(element.attrib.items()):
        if key == "id":
            element.set(key, f"{name}-{value}")
        elif key == _LINK:
            del element.attrib[key]
            element.set("href", f"#{name}-{value.removeprefix('#')}")
        elif value.startswith("url(#"):
            element.set(key, value.replace("url(#", f"url(#{name}-"))


def _restyled(style: str, ink: Ink) -> str:
    """The reader's colour and the page's font."""
    parts = [part.strip() for part in style.split(";")]
    kept = "; ".join(part for part in parts if part and not part.startswith(("font-family", "font: ")))
    fonts = [part.removeprefix("font: ") for part in parts if part.startswith("font: ")]
    if fonts:
        kept = f"font-size: {fonts[0].split(' ', 1)[0]}; {kept}"
    return kept if ink == "paper" else kept.replace(INK, "currentColor")


def _tell(root: ElementTree.Element, picture: Picture, ink: Ink) -> None:
    """Put first what a reader who sees no pictures is told, and the colours that follow the reader's scheme."""
    described = ElementTree.Element("desc", {"id": f"{picture.name}-desc"})
    described.text = label(picture.says, most=4000)
    titled = ElementTree.Element("title", {"id": f"{picture.name}-title"})
    titled.text = label(picture.title, most=200)
    if ink == "scheme":
        colours = ElementTree.Element("style")
        colours.text = f"svg{{color:{INK}}}@media(prefers-color-scheme:dark){{svg{{color:{_INK_DARK}}}}}"
        root.insert(0, colours)
    root.insert(0, described)
    root.insert(0, titled)
