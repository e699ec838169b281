"""What a C library prints does not reach standard output."""

from __future__ import annotations

import subprocess
import sys

import pytest

_PRINTS = """
import ctypes, os
from threading import Thread
from persyn.method.quiet import stdout_to_stderr

def noise():
    for _ in range(20):
        with stdout_to_stderr():
            ctypes.CDLL(None).puts(b"noise")

threads = [Thread(target=noise) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print("{}")
"""


def test_a_c_librarys_lines_go_to_standard_error() -> None:
    found = subprocess.run([sys.executable, "-c", _PRINTS], check=True, capture_output=True, text=True)

    assert found.stdout == "{}\n"
    assert found.stderr == "noise\n" * 80


@pytest.mark.parametrize("closed", [1, 2])
def test_a_closed_output_is_no_error(closed: int) -> None:
    code = f"import os; os.close({closed}){_PRINTS.replace('print', 'str')}"

    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
