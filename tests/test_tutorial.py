"""The tutorial's commands work and print what it shows.

Blocks marked `sh` are run in sequence; blocks marked `bash` are not run. A block marked `text` directly after a block
that is run shows its output. There `...` stands for anything within a line or, on a line of its own, for any number of
lines; the amount of space between words is ignored.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from tests import forked

ROOT = Path(__file__).parents[1]


def blocks(page: str) -> list[tuple[str, str | None]]:
    """The commands to run, each with the output shown for it."""
    found: list[tuple[str, str | None]] = []
    is_shown_next = False
    for token in MarkdownIt().parse(page):
        if token.type != "fence":
            continue
        if token.info == "sh":
            found.append((token.content, None))
        elif token.info == "text" and is_shown_next:
            found[-1] = (found[-1][0], token.content)
        is_shown_next = token.info == "sh"
    return found


def plain(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


def pattern(lines: list[str]) -> str:
    inside = (re.escape(line).replace(re.escape("..."), ".*?") for line in lines)
    return "".join("(?:.*\n)*?" if line == ".*?" else f"{line}\n" for line in inside)


def wrong(shown: str, printed: str) -> str | None:
    """The first line that is shown but not printed, or printed but not shown."""
    lines = plain(shown)
    text = "".join(f"{line}\n" for line in plain(printed))
    if re.fullmatch(pattern(lines), text):
        return None
    held = [number for number in range(len(lines) + 1) if re.match(pattern(lines[:number]), text)]
    return [*lines, "(the end)"][held[-1]]


@pytest.mark.parametrize(
    ("shown", "printed", "at"),
    [
        ("a  1\n", "a 1\n", None),
        ("a ...\n", "a 1 2\n", None),
        ("a\n...\nb\n", "a\n1\n2\nb\n", None),
        ("a\n...\nb\n", "a\nb\n", None),
        ("a 1\n", "a 2\n", "a 1"),
        ("a\nb\n", "a\nc\n", "b"),
        ("a\n", "a\nb\n", "(the end)"),
        ("x.y\n", "x y\n", "x.y"),
    ],
)
def test_only_what_an_ellipsis_stands_for_may_differ(shown: str, printed: str, at: str | None) -> None:
    assert wrong(shown, printed) == at


def test_the_tutorial_does_what_it_says(tmp_path: Path, commands_folder: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PERSYN_")}
    environment["PATH"] = f"{commands_folder}:{Path(sys.executable).parent}:{environment['PATH']}"
    environment["PYTHONPATH"] = forked.MODULES
    place = tmp_path / "place"
    there = tmp_path / "empty"
    there.mkdir()
    for commands, shown in blocks((ROOT / "docs/tutorial.md").read_text()):
        done = subprocess.run(
            ["bash", "-euc", f"{commands}\npwd > {place}"],
            cwd=there,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, f"{commands}\nfailed and said\n\n{done.stdout}"
        if shown is not None and (line := wrong(shown, done.stdout)):
            pytest.fail(
                f"the tutorial shows after\n\n{commands}\nthe line\n\n{line}\n\nand printed is\n\n{done.stdout}"
            )
        there = Path(place.read_text().strip())
