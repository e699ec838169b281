"""What of the documentation is made from the code is as the code has it."""

from __future__ import annotations

import re

import pytest

from docs import make
from persyn.questions import book
from tests.questions.test_views import COLUMNS


@pytest.mark.parametrize("file", list(make.MADE))
def test_what_is_made_is_up_to_date(file: str) -> None:
    assert make.made(file) == (make.ROOT / file).read_text(), "run: python -m docs.make"


def test_every_view_is_explained_and_its_columns_are_as_promised() -> None:
    explained = re.findall(r"^\| `(v_\w+)` \|", (make.ROOT / "docs/sql.md").read_text(), re.MULTILINE)
    assert sorted(explained) == sorted(make.views())
    assert make.views() == {view: columns.split() for view, columns in COLUMNS.items()}


def test_the_page_says_how_many_questions_there_are() -> None:
    assert len(book.questions()) == 21
    assert "## Twenty-one questions" in (make.ROOT / "docs/sql.md").read_text()
