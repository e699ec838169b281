"""The generated parts of the documentation match the code."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import pytest
from msgspec import Meta, Struct

from docs import keys, make
from persyn.cli import reference
from persyn.llm.engines import ENGINES
from persyn.settings import Settings
from tests.sql.test_views import COLUMNS


@pytest.mark.parametrize("file", list(make.MADE))
def test_what_is_made_is_up_to_date(file: str) -> None:
    assert make.made(file) == (make.ROOT / file).read_text(), "run: python -m docs.make"


def test_every_view_is_explained_and_its_columns_are_as_promised() -> None:
    explained = re.findall(r"^\| `(v_\w+)` \|", (make.ROOT / "docs/sql.md").read_text(), re.MULTILINE)
    assert sorted(explained) == sorted(make.views())
    assert make.views() == {view: columns.split() for view, columns in COLUMNS.items()}


def test_the_command_page_is_what_the_commands_say() -> None:
    assert reference.page() == (make.ROOT / "docs/commands.md").read_text(), "run: make reference"


class Bread(Struct):
    #: How many | are baked.
    number: Annotated[int, Meta(ge=1)]
    #: As it is sold.
    name: Annotated[str, Meta(title="name", max_length=9)] = "two words"


class Rye(Bread):
    #: Of the flour; none: the baker
    #: chooses.
    share: Annotated[float, Meta(gt=0, le=1)] | None = None
    #: How it rises.
    kind: Literal["sour", "plain"] = "sour"
    #: Hours of each rest.
    rests: list[float] | float = 1.0
    #: What it is eaten with.
    under: list[Literal["jam", "cheese"]] = []
    #: Whatever else.
    more: dict[str, Any] = {}
    #: Before it is sold.
    is_cut: bool = False


class Spelt(Bread):
    # Not a meaning: no colon.
    is_cut: bool = False


def test_a_table_says_of_each_key_what_stands_at_its_field() -> None:
    assert keys.of_struct(Rye).strip().splitlines() == [
        "| key | type | default | meaning |",
        "| --- | --- | --- | --- |",
        "| `number` | integer >= 1 | required | How many \\| are baked. |",
        '| `name` | name | "two words" | As it is sold. |',
        "| `share` | number > 0 and <= 1 | none | Of the flour; none: the baker chooses. |",
        "| `kind` | `sour`, `plain` | `sour` | How it rises. |",
        "| `rests` | list of numbers or number | 1 | Hours of each rest. |",
        "| `under` | list of `jam`, `cheese` | empty | What it is eaten with. |",
        "| `more` | table | empty | Whatever else. |",
        "| `is_cut` | true or false | false | Before it is sold. |",
    ]


def test_a_key_of_which_nothing_is_said_is_named() -> None:
    with pytest.raises(ValueError, match=r"Spelt has no #: comment above is_cut$"):
        keys.of_struct(Spelt)


def test_every_engine_has_a_section_with_its_options() -> None:
    page = (make.ROOT / "docs/run-file.md").read_text()
    sections = " ".join(re.findall(r"^### (.+)$", page.partition("## Options of the engines")[2], re.MULTILINE))
    # check loads teachers with their options; those of strategy are under [strategy].
    with_options = {kind.name for kind in ENGINES.builtin.values() if kind.module}
    assert with_options - set(sections.split()) == {"check", "strategy"}


def test_every_variable_of_the_page_is_read() -> None:
    variables = re.findall(r"^\| `(PERSYN_\w+)` \|", keys.of_environment(), re.MULTILINE)
    assert len(variables) == 7
    plain = Settings.from_environment({})
    assert all(Settings.from_environment({variable: "7"}) != plain for variable in variables)
