"""Write the generated parts of the documentation: `python -m docs.make`."""

from __future__ import annotations

import json
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path

from sqlalchemy import Column, inspect
from sqlalchemy.dialects.postgresql import dialect as postgresql_dialect

from docs import diagram, keys
from persyn.db import Base
from persyn.db.connect import Database
from persyn.sql import postgres, saved

ROOT = Path(__file__).parent.parent


def saved_queries() -> str:
    """The saved queries, as Markdown."""
    lines = []
    for asker in saved.ASKERS:
        lines.append(f"### For the {asker}\n")
        for each in saved.queries().values():
            if each.asker == asker:
                values = "".join(f" -p {name}=..." for name in each.parameters)
                lines.append(f"**{each.title}** `persyn sql --ask {each.name}{values}`\n\n{each.note}\n")
                lines.append(f"```sql\n{each.sql}\n```\n")
    return "\n".join(lines)


def functions() -> str:
    """The functions that a query may call on PostgreSQL, as Markdown."""
    return textwrap.fill(", ".join(f"`{name}`" for name in sorted(postgres.FUNCTIONS)), 120) + "\n"


def columns() -> str:
    """Every column of every table and view."""
    lines = []
    for table in sorted(Base.metadata.tables.values(), key=lambda each: each.name):
        rows = [
            f"| `{each.name}` | {_type(each).replace('_', ' ')}{', or null' * bool(each.nullable)} | {_what(each)} |"
            for each in table.columns
        ]
        lines.append(
            "\n".join([f"### {table.name}\n", "| column | type | description |", "| --- | --- | --- |", *rows, ""])
        )
    lines.append("## Views\n")
    lines += [f"**{view}**: {', '.join(f'`{name}`' for name in names)}\n" for view, names in views().items()]
    return "\n".join(lines)


def views() -> dict[str, list[str]]:
    """The columns of each view, as a store has them."""
    with tempfile.TemporaryDirectory() as folder:
        store = Database(f"sqlite:///{folder}/persyn.db")
        store.upgrade()
        seen = inspect(store.engine)
        found = {view: [column["name"] for column in seen.get_columns(view)] for view in sorted(seen.get_view_names())}
        store.close()
    return found


def datasette() -> str:
    """The saved queries, as Datasette's metadata."""
    lines = []
    for each in saved.queries().values():
        lines.append(f"      {each.name}:\n        title: {json.dumps(each.title)}\n")
        lines.append(f"        description: {json.dumps(each.note)}\n        sql: |-\n")
        lines.append(textwrap.indent(each.sql, " " * 10) + "\n")
    return "".join(lines)


def _type(column: Column[object]) -> str:
    return column.type.compile(dialect=postgresql_dialect()).lower().replace(" ", "_")  # type: ignore[no-untyped-call]


def _what(column: Column[object]) -> str:
    belongs = "".join(f"refers to `{key.column.table.name}`" for key in column.foreign_keys)
    return "; ".join(each for each in (belongs, column.comment) if each).replace("|", "\\|")


#: The generated parts of each file, and the functions that generate them.
MADE: dict[str, dict[str, Callable[[], str]]] = {
    "docs/sql.md": {"saved queries": saved_queries, "functions": functions},
    "docs/images/store.svg": {"diagram": diagram.picture},
    "docs/columns.md": {"columns": columns},
    "docs/run-file.md": keys.RUN_FILE,
    "docs/method.md": {"learnabilities": keys.of_learnabilities},
    "deploy/datasette.yaml": {"datasette": datasette},
}


def made(file: str) -> str:
    """The file's text with its generated parts up to date."""
    comment = "# {}" if file.endswith(".yaml") else "<!-- {} -->"
    text = (ROOT / file).read_text()
    for name, make in MADE[file].items():
        begin, end = comment.format(f"made: {name}") + "\n", comment.format("/made")
        head, is_there, rest = text.partition(begin)
        _, has_end, tail = rest.partition(end)
        assert is_there, f"{file} has no place for {name}"
        assert has_end, f"{file} has no end of {name}"
        text = f"{head}{begin}{make()}{end}{tail}"
    return text


def main() -> None:
    """Write all generated parts."""
    for file in MADE:
        (ROOT / file).write_text(made(file))


if __name__ == "__main__":
    main()
