"""Run `persyn` with a wrong clock: python -m tests.skewed SECONDS ARGUMENTS..."""

from __future__ import annotations

import sys
import time


def main() -> None:
    """Shift this process's clock before anything reads it, then run the command."""
    seconds, read, read_ns = float(sys.argv.pop(1)), time.time, time.time_ns
    time.time = lambda: read() + seconds
    time.time_ns = lambda: read_ns() + int(seconds * 1e9)
    from persyn.cli.main import main as persyn

    persyn()


if __name__ == "__main__":
    main()
