"""`persyn init`: write a run file and example rows."""

from __future__ import annotations

import shlex
from importlib.resources import files
from pathlib import Path

import click

from persyn.errors import UsageError

#: Name: (the file of rows, the next step); FOLDER stands for the target folder.
_TEMPLATES = {
    "small": ("prompts.jsonl", "persyn run start FOLDER/run.toml"),
    "fake": ("prompts.jsonl", "persyn run start FOLDER/run.toml"),
    "api": ("prompts.jsonl", "enter your servers in FOLDER/run.toml, then: persyn run start FOLDER/run.toml"),
    "cluster": ("prompts.jsonl", "put your prompts next to FOLDER/run.toml, then: persyn run start FOLDER/run.toml"),
    "imported": (
        "grid.jsonl",
        "persyn responses import FOLDER/grid.jsonl --score correct && persyn run start FOLDER/run.toml",
    ),
}


@click.command()
@click.argument("folder", default=".", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--template",
    type=click.Choice(list(_TEMPLATES)),
    default="small",
    show_default=True,
    help="small: two small models, on any machine. fake: no model and no network, to see what a run does. "
    "api: teachers behind servers. cluster: GPUs. imported: responses that exist already.",
)
def init(folder: Path, template: str) -> None:
    """Write a commented run.toml and a few example rows into FOLDER; existing files are not overwritten."""
    rows, following = _TEMPLATES[template]
    written = {"run.toml": f"{template}.toml", rows: rows}
    if there := [name for name in written if (folder / name).exists()]:
        raise UsageError(f"{folder / there[0]} exists already; give another folder, or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    for name, packaged in written.items():
        (folder / name).write_bytes((files("persyn.cli") / "templates" / packaged).read_bytes())
        click.echo(f"wrote {folder / name}")
    click.echo(f"next: {following.replace('FOLDER', shlex.quote(str(folder)))}")
