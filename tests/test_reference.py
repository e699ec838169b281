"""The reference pages say what the program says: commands, and every key of a run file with its default."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec import NODEFAULT, Struct

from cli import reference
from persyn import config
from persyn.llm import fake, instructions, judge, math, openai

DOCS = Path(__file__).parents[1] / "docs"

#: Heading of docs/run-file.md: the table of the file, or an engine's options, that it describes.
TABLES: Mapping[str, type[Struct]] = {
    "[run]": config.RunTable,
    "[prompts]": config.PromptsTable,
    "[student]": config.StudentTable,
    "[quality]": config.QualityTable,
    "[router]": config.RouterTable,
    "[strategy]": config.StrategyTable,
    "[[teachers]]": config.TeacherTable,
    "sampling": config.Sampling,
    "openai": openai.Options,
    "judge": judge.Options,
    "math": math.Options,
    "instructions": instructions.Options,
    "fake": fake.Options,
}
#: How the page writes a default that is no plain value; left empty, its meaning says it.
WORDS = {None: ("none", ""), (): ("empty", ""), "": ("none",)}


def documented(heading: str) -> dict[str, str]:
    """The keys of a section's tables, each with its default; keys that share a row have a row each."""
    text = (DOCS / "run-file.md").read_text()
    (section,) = re.findall(rf"^##+ {re.escape(heading)}$\n(.*?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL)
    found, header = {}, [""]
    for line in section.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if "default" in cells:
            header = cells
        elif cells and header[0] in ("key", "option"):
            place = header.index("default")
            found |= {key: cells[place] if place < len(cells) else "" for key in re.findall(r"`(\w+)`", cells[0])}
        if not cells:
            header = [""]
    return found


def default(field: msgspec.structs.FieldInfo) -> Any:
    made = field.default_factory() if field.default_factory is not NODEFAULT else field.default
    return tuple(made) if isinstance(made, list | dict) else made


def matches(written: str, value: Any) -> bool:
    """Whether the page's words are the default. Words for what another part of the program decides are its own."""
    plain = written.strip("`").replace(",", "")
    if value is NODEFAULT:
        return plain == "required"
    if isinstance(value, bool):
        return plain == str(value).lower()
    if isinstance(value, int | float):
        return re.fullmatch(r"[\d.e-]+", plain) is not None and float(plain) == value
    if isinstance(value, Struct):
        return plain == "see below"
    if value in WORDS:
        return plain in WORDS[value]
    is_sentence = " " in str(value)
    return is_sentence or plain == str(value)


def test_the_command_page_is_what_the_commands_say() -> None:
    page = (DOCS / "commands.md").read_text()
    assert page == reference.page(), "run: make reference"


@pytest.mark.parametrize("heading", TABLES)
def test_every_key_is_documented_with_its_default_and_no_other_is(heading: str) -> None:
    fields = {field.name: field for field in msgspec.structs.fields(TABLES[heading])}
    written = documented(heading)
    shared = {"revision", "gpus", "options"} if heading == "[quality]" else set()  # "as above"
    assert set(written) == set(fields)
    wrong = {
        name: (written[name], default(field))
        for name, field in fields.items()
        if name not in shared and not matches(written[name], default(field))
    }
    assert not wrong
