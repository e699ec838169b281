"""Formatting of values in command output."""

from __future__ import annotations

import pytest

from persyn.cli.context import cell, show


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.47916, "0.4792"),
        (9999.4, "9999"),
        (9999.9, "10,000"),
        (380_800.0, "380,800"),
        (-12_345_678.0, "-12,345,678"),
        (2.5e-7, "2.5e-07"),
        (1e18, "1e+18"),
        (float("nan"), "nan"),
        (384, "384"),
        (None, "-"),
    ],
)
def test_a_number_is_shown_in_full_where_that_reads_better(value: float | None, shown: str) -> None:
    assert cell(value) == shown


def test_a_table_may_leave_out_what_is_empty_and_separate_thousands(capsys: pytest.CaptureFixture[str]) -> None:
    show(
        ("name", "rows", "cost"), [("a", 12_345, None), ("b", 7, None)], as_json=False, skip_empty=True, separators=True
    )
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["name", "rows"],
        ["a", "12,345"],
        ["b", "7"],
    ]
