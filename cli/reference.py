"""Generate the command reference from the commands: `python -m persyn.cli.reference > docs/commands.md`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import click

from persyn.cli.main import persyn

_OPENING = """\
# Commands

What `--help` says, on one page; made from the program by `make reference`.

Every command takes `-h` and `--help`. `--json` prints JSON where a list or a status is printed. Tables fit the
terminal; in a pipe a row is a line, but that `persyn sql` gives each column a line where a row is too wide. Results go
to standard output, progress and errors to standard error. Exit codes: 0 done, 1 the work failed or a check found
something, 2 wrong usage, 3 a run is done and more than 5% of a stage's rows failed, 130 or 143 interrupted. Nothing is
coloured where `NO_COLOR` is set.

A shell that completes commands, options, files and runs: see [`persyn completion`](#persyn-completion).
"""


def page() -> str:
    """The whole page as Markdown."""
    return "\n".join([_OPENING, *_lines(click.Context(persyn, info_name="persyn"))])


def _lines(context: click.Context) -> Iterator[str]:
    """Describe a command and its subcommands."""
    command = context.command
    depth = 2 if context.parent is None or context.parent.parent is None else 3
    yield f"{'#' * depth} {context.command_path}\n"
    yield f"```text\n{' '.join([context.command_path, *command.collect_usage_pieces(context)])}\n```\n"
    yield from _prose(inspect.cleandoc(command.help or ""))
    options = [param.get_help_record(context) for param in command.params if isinstance(param, click.Option)]
    if options:
        yield "| option | meaning |\n| --- | --- |"
        yield from (f"| `{_cell(names)}` | {_cell(meaning)} |" for names, meaning in filter(None, options))
        yield ""
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            yield from _lines(click.Context(inner, info_name=name, parent=context))


def _prose(text: str) -> Iterator[str]:
    """Paragraphs; those marked as preformatted for click become code blocks."""
    for paragraph in text.split("\n\n"):
        block = paragraph.removeprefix("\b\n")
        yield f"```sh\n{block}\n```\n" if block != paragraph else f"{block}\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    click.echo(page(), nl=False)
