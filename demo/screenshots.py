"""Take the screenshots of the documentation: the console and the report of the demo's run.

python -m demo.screenshots [build/demo/transformers/persyn.db]
"""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from PIL import Image
from playwright.sync_api import Browser

from persyn.cli.context import find_run
from persyn.db.connect import Database
from persyn.report import document, figures, gather
from persyn.web.safety import Access
from tests import chromium

_FOLDER = Path("docs/images")
_RUN = "demo"


@dataclass(frozen=True)
class Picture:
    """A page and its viewport."""

    name: str
    page: str
    #: In CSS pixels.
    width: int
    height: int
    scheme: Literal["light", "dark"] = "light"


_CONSOLE = (
    Picture("console-run", f"/runs/{_RUN}", 1100, 745),
    Picture("console-figures", f"/runs/{_RUN}#figures", 1100, 740),
    Picture("console-prompts", f"/runs/{_RUN}/prompts?order=margin&reason=router", 1100, 620),
    Picture("console-prompt", f"/runs/{_RUN}/prompts/17", 1100, 900, "dark"),
    Picture("console-phone", f"/runs/{_RUN}", 380, 760, "dark"),
)
_REPORT = (
    Picture("report-top", "", 1100, 752),
    Picture("report-figures", "#figures", 1100, 985, "dark"),
)


def main(path: Path) -> None:
    """Serve the store, write the report, and save a screenshot of each page."""
    if chromium.find() is None:
        sys.exit(chromium.MISSING)
    if not path.exists():
        sys.exit(f"no store at {path}; create it with 'make demo'")
    _FOLDER.mkdir(exist_ok=True)
    store = Database(f"sqlite:///{path}")
    store.require_head()
    with chromium.running() as browser, TemporaryDirectory() as folder:
        with chromium.console(store, Access()) as address:
            for picture in _CONSOLE:
                _keep(picture, _seen(browser, address, picture))
        for picture in _REPORT:
            _keep(picture, _seen(browser, _report(store, Path(folder) / "report.html"), picture))
    store.close()


def _report(store: Database, file: Path) -> str:
    """Write the run's report and return its address."""
    with store.read() as session:
        found = gather.gather(session, find_run(session, _RUN))
    file.write_text(document.html(found, figures.pictures(found)), encoding="utf-8")
    return file.as_uri()


def _seen(browser: Browser, address: str, picture: Picture) -> Image.Image:
    page = browser.new_page(viewport={"width": picture.width, "height": picture.height}, device_scale_factor=1.5)
    page.emulate_media(color_scheme=picture.scheme)
    page.goto(address + picture.page)
    page.wait_for_function("() => !document.body.dataset.live")  # all counts are complete
    page.reload()
    page.wait_for_load_state("networkidle")
    # Figures loaded late have shifted the element that the URL refers to.
    page.evaluate("document.querySelector(':target')?.scrollIntoView()")
    found = Image.open(io.BytesIO(page.screenshot()))
    page.close()
    return found


def _keep(picture: Picture, seen: Image.Image) -> None:
    file = _FOLDER / f"{picture.name}.png"
    # Median cut, the default, would merge the colours of thin lines with their surroundings.
    seen.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=3).save(file, "PNG", optimize=True)
    print(f"{file} {file.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/demo/transformers/persyn.db"))
