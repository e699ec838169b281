"""`persyn export`: a run's dataset."""

from __future__ import annotations

from pathlib import Path

import click

from cli.open import RUN, find_run, store
from persyn.settings import Settings
from persyn.stages import export as dataset

FORMATS = ("messages", "sharegpt", "alpaca", "parquet")


@click.command()
@RUN
@click.option(
    "--format", "formats", multiple=True, type=click.Choice(FORMATS), help="May be given again. Default: all."
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder. Default: PERSYN_HOME/datasets/RUN.")
def export(run: str, formats: tuple[str, ...], output: Path | None) -> None:
    """Write the dataset of RUN, as far as it is generated; an older one there is replaced as a whole."""
    with store() as database:
        with database.read() as session:
            run_id = find_run(session, run).id
        folder = output or Settings.from_environment().home / "datasets" / run
        manifest = dataset.write(database, run_id, folder, formats or FORMATS)
    click.echo(f"{manifest.exported} rows in {folder}")
