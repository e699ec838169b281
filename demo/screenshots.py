"""The pictures of the documents: the console, as it shows the demo's run.

python -m demo.screenshots [build/demo/transformers/persyn.db]
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser

from console.safety import Access
from persyn.db.connect import Database
from tests import chromium

_FOLDER = Path("docs/images")
_RUN = "demo"
#: Name, page, width, height and colours.
_PICTURES = (
    ("console-run", f"/runs/{_RUN}", 1100, 900, "light"),
    ("console-figures", f"/runs/{_RUN}#figures", 1100, 760, "light"),
    ("console-prompts", f"/runs/{_RUN}/prompts?order=margin&reason=router", 1100, 640, "light"),
    ("console-prompt", f"/runs/{_RUN}/prompts/17", 1100, 900, "dark"),
    ("console-phone", f"/runs/{_RUN}", 380, 760, "dark"),
)
#: Flat colours and letters need no more.
_COLOURS = 128


def main(path: Path) -> None:
    """Serve the store, look at each page, write what is seen."""
    if chromium.find() is None:
        sys.exit(chromium.MISSING)
    if not path.exists():
        sys.exit(f"there is no store {path}; 'make demo' makes it")
    _FOLDER.mkdir(exist_ok=True)
    store = Database(f"sqlite:///{path}")
    store.require_head()
    with chromium.console(store, Access()) as address, chromium.running() as browser:
        for name, page, width, height, colours in _PICTURES:
            picture = _seen(browser, address + page, width, height, colours)
            file = _FOLDER / f"{name}.png"
            file.write_bytes(picture)
            print(f"{file} {len(picture) / 1024:.0f} KiB")
    store.close()


def _seen(browser: Browser, url: str, width: int, height: int, colours: str) -> bytes:
    page = browser.new_page(viewport={"width": width, "height": height}, device_scale_factor=1.5)
    page.emulate_media(color_scheme="dark" if colours == "dark" else "light")
    page.goto(url)
    page.wait_for_function("() => !document.body.dataset.live")  # everything is counted
    page.reload()
    page.wait_for_load_state("networkidle")
    found = Image.open(io.BytesIO(page.screenshot()))
    page.close()
    small = io.BytesIO()
    found.convert("RGB").quantize(_COLOURS).save(small, "PNG", optimize=True)
    return small.getvalue()


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/demo/transformers/persyn.db"))
