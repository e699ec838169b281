"""`persyn completion`: shell completion of commands, options, files and runs."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

import click
from click.shell_completion import get_completion_class

#: Time limit for querying the store, since the user is waiting for a completion.
_SECONDS = 2.0


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script that makes SHELL complete persyn's commands, options, files and runs.

    \b
    bash  in ~/.bashrc:  eval "$(persyn completion bash)"
    zsh   in ~/.zshrc:   eval "$(persyn completion zsh)"
    fish:                persyn completion fish > ~/.config/fish/completions/persyn.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(click.get_current_context().find_root().command, {}, "persyn", "_PERSYN_COMPLETE").source())


def run_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Complete run names; empty if there is no store, or it does not answer in time."""
    found: list[str] = []
    asking = threading.Thread(target=lambda: found.extend(_names(incomplete)), daemon=True)
    asking.start()
    asking.join(_SECONDS)
    return found


def _names(incomplete: str) -> list[str]:
    with contextlib.suppress(Exception):  # the command itself will report any error
        from sqlalchemy import select

        from persyn.db.catalog import Run
        from persyn.db.connect import Database
        from persyn.settings import Settings

        database = Database(Settings.from_environment().database_url)
        file = database.url.database if database.url.get_backend_name() == "sqlite" else None
        if file is None or Path(file).exists():
            with contextlib.closing(database), database.read() as session:
                begins = Run.name.startswith(incomplete, autoescape=True)
                return list(session.scalars(select(Run.name).where(begins).order_by(Run.id.desc()).limit(100)))
    return []
