"""Render figures as SVG with real text or as PNG, independently of their content.

Figures are transparent, and use colours that are distinguishable on light and dark backgrounds and with colour
blindness.
Their texts are untrusted: they are never interpreted as mathematics or markup.
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

#: The colour of text and lines; in an SVG it is replaced by the reader's own.
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
    # Dollar signs in names are literal.
    "text.parse_math": False,
    "xtick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.color": INK,
    "ytick.major.width": 0.6,
}
#: matplotlib's settings are global to all threads.
_ONE_AT_A_TIME = RLock()
_SVG = "{http://www.w3.org/2000/svg}"
_LINK = "{http://www.w3.org/1999/xlink}href"

Ink: TypeAlias = Literal["page", "scheme", "paper"]
"""The colour of text in an SVG: that of the surrounding page, one that follows the reader's light or dark scheme (for a
separate image), or black (for print).
"""


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure with its description.

    name:  its file name, without an ending.
    title: what it shows.
    says:  a textual alternative.
    """

    name: str
    title: str
    says: str
    figure: Figure


def svg(picture: Picture, *, ink: Ink = "page") -> str:
    """Render one `<svg>` element with real text, deterministic and safe to embed in an HTML page."""
    buffer = io.BytesIO()
    with styled():
        picture.figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    return _mended(buffer.getvalue(), picture, ink)


def png(picture: Picture) -> bytes:
    """Render a PNG on white for print, at 200 dots per inch."""
    buffer = io.BytesIO()
    with styled():
        picture.figure.savefig(buffer, format="png", dpi=200, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def laid_out(picture: Picture) -> Picture:
    """Compute the layout once: repeating it for each save would change the result."""
    with styled():
        picture.figure.draw_without_rendering()
        picture.figure.set_layout_engine("none")
    return picture


def label(text: str, *, most: int = 26) -> str:
    """Shorten a name to fit beside an axis: one line, printable, with the middle of a long name left out."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= most else f"{line[: most // 3]}…{line[len(line) - (most - most // 3 - 1) :]}"


@contextmanager
def styled() -> Iterator[None]:
    """Apply our matplotlib settings, for one thread at a time."""
    with _ONE_AT_A_TIME, warnings.catch_warnings(), matplotlib.style.context(["default", _STYLE]):
        # The reader's browser has more glyphs than the font that measures the text.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def _mended(drawn: bytes, picture: Picture, ink: Ink) -> str:
    """Adapt matplotlib's output for a page: responsive size, description, unique ids and the reader's colours."""
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
    """Prefix ids with the figure's name, because ids are global to a page."""
    for key, value in list(element.attrib.items()):
        if key == "id":
            element.set(key, f"{name}-{value}")
        elif key == _LINK:
            del element.attrib[key]
            element.set("href", f"#{name}-{value.removeprefix('#')}")
        elif value.startswith("url(#"):
            element.set(key, value.replace("url(#", f"url(#{name}-"))


def _restyled(style: str, ink: Ink) -> str:
    """Use the reader's colour and the page's font."""
    parts = [part.strip() for part in style.split(";")]
    kept = "; ".join(part for part in parts if part and not part.startswith(("font-family", "font: ")))
    fonts = [part.removeprefix("font: ") for part in parts if part.startswith("font: ")]
    if fonts:
        kept = f"font-size: {fonts[0].split(' ', 1)[0]}; {kept}"
    return kept if ink == "paper" else kept.replace(INK, "currentColor")


def _tell(root: ElementTree.Element, picture: Picture, ink: Ink) -> None:
    """Insert the title, the description, and colours that follow the reader's scheme."""
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
