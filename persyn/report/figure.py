"""A figure that a notebook displays and a script saves."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from persyn.errors import UsageError

if TYPE_CHECKING:
    from persyn.report.drawing import Picture


class Figure:
    """A figure of a run; notebooks display it."""

    def __init__(self, picture: Picture) -> None:
        self._picture = picture
        #: The name of the figure, what it shows, and its content in words.
        self.name, self.title, self.description = picture.name, picture.title, picture.says

    def __repr__(self) -> str:
        return f"<persyn.Figure {self.name}: {self.description}>"

    def _repr_svg_(self) -> str:
        return self.svg()

    def svg(self) -> str:
        """SVG with real text and colours that follow the reader's light or dark scheme."""
        from persyn.report import drawing

        return drawing.svg(self._picture, ink="scheme")

    def png(self) -> bytes:
        """As PNG on white, 200 dots per inch."""
        from persyn.report import drawing

        return drawing.png(self._picture)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the figure to a .svg or .png file."""
        place = Path(path)
        match place.suffix.lower():
            case ".svg":
                place.write_text(self.svg(), encoding="utf-8")
            case ".png":
                place.write_bytes(self.png())
            case ending:
                raise UsageError(f"a figure's file name must end in .svg or .png, got {ending or 'no extension'}")
