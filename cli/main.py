"""The `persyn` command: its subcommands, and the reporting of errors.

The module of a subcommand is imported only when it is called, so that help is fast.
"""

from __future__ import annotations

import signal
import sys
from importlib import import_module

import click
from click.shell_completion import CompletionItem

from persyn.cli.extras import extra_of
from persyn.errors import PersynError, UsageError, shorten

#: Name: (module, attribute, help).
_COMMANDS = {
    "init": ("persyn.cli.init", "init", "Write a run file and a few example prompts."),
    "doctor": ("persyn.cli.doctor", "doctor", "Check this host, the store, the broker and the workers."),
    "store": ("persyn.cli.store", "store", "Copy a whole store to another database."),
    "db": ("persyn.cli.db", "db", "Create or upgrade the store, and show its revision."),
    "prompts": ("persyn.cli.prompts", "prompts", "Import and list prompts."),
    "responses": ("persyn.cli.responses", "responses", "Import existing responses."),
    "teachers": ("persyn.cli.teachers", "teachers", "List teachers, and check them before a run."),
    "plan": ("persyn.cli.plan", "plan", "Estimate requests and tokens of a run, and its cost and time where known."),
    "run": ("persyn.cli.run", "run", "Start, extend, resume, watch, pause, rename and delete runs."),
    "worker": ("persyn.cli.worker", "worker", "Process the jobs of all runs on this host's GPUs."),
    "dispatch": ("persyn.cli.dispatch", "dispatch", "Notify workers of waiting jobs; requeue jobs of dead workers."),
    "metrics": ("persyn.cli.metrics", "metrics", "Serve metrics of the store for Prometheus."),
    "jobs": ("persyn.cli.jobs", "jobs", "List, retry and cancel a run's jobs."),
    "router": ("persyn.cli.router", "router", "Show routers and their learning curves, export and import them."),
    "compare": ("persyn.cli.compare", "compare", "Compare strategies on a run's hold-out prompts."),
    "pilot": ("persyn.cli.pilot", "pilot", "Train small students to see which reward predicts what a student becomes."),
    "student": ("persyn.cli.student", "student", "Train a run's student on its dataset, and evaluate it."),
    "report": ("persyn.cli.report", "report", "Write a report of a run with figures."),
    "export": ("persyn.cli.export", "export", "Write a run's dataset."),
    "trace": ("persyn.cli.trace", "trace", "Show the provenance of one prompt's response."),
    "audit": ("persyn.cli.audit", "audit", "Check a run's consistency in the store."),
    "web": ("persyn.cli.web", "web", "Serve the console: runs, prompts, failures and SQL, in a browser."),
    "completion": ("persyn.cli.completion", "completion", "Set up shell completion."),
    "sql": ("persyn.cli.sql", "sql", "Query the store with SQL, read-only."),
}


class _Lazy(click.Group):
    """A group that lists its commands without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, attribute, _ = _COMMANDS[cmd_name]
        command: click.Command = getattr(import_module(module), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; for an unknown name, suggest the nearest."""
        try:
            return super().resolve_command(ctx, args)
        except click.NoSuchCommand as error:
            raise click.NoSuchCommand(error.command_name, possibilities=_COMMANDS, ctx=ctx) from None

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete commands and options without importing any command."""
        commands = [
            CompletionItem(name, help=text) for name, (_, _, text) in _COMMANDS.items() if name.startswith(incomplete)
        ]
        return commands + click.Command.shell_complete(self, ctx, incomplete)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, _, text) in _COMMANDS.items()])


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="persyn")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_context
def persyn(ctx: click.Context, debug: bool) -> None:
    """Route each prompt to the teacher whose answers suit your student best, then generate.

    The store is PERSYN_DATABASE_URL (default: a SQLite file in PERSYN_HOME), files are kept in
    PERSYN_HOME (default: ./persyn-data). With PERSYN_BROKER_URL (Redis or Valkey), runs are
    executed by 'persyn worker' processes on any number of hosts. Begin with 'persyn init'.
    """
    ctx.ensure_object(dict)["debug"] = debug


def main() -> None:
    """Run the command; exit 0 on success, 1 on failure, 2 on wrong usage, 130 or 143 when interrupted."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that temporary files are removed on exit
    try:
        persyn(prog_name="persyn", standalone_mode=False)
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(130)
    except PersynError as error:
        _explain(str(error))
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except Exception as error:
        _explain(_foreign(error))
        sys.exit(1)


def _explain(message: str) -> None:
    """Print an error on one line; with --debug, print the traceback first."""
    if "--debug" in sys.argv:
        import traceback

        traceback.print_exc()
    click.echo(f"error: {shorten(message, most=2000)}", err=True)


def _foreign(error: Exception) -> str:
    """Summarise a library's error on one line: a database error, a missing package, a file error, or its type."""
    original = getattr(error, "orig", None)
    if "database is locked" in str(original):
        return "another process keeps the store locked; find it with 'fuser' or 'lsof', then try again"
    if original is not None:
        return f"database error: {original}; 'persyn doctor' checks the store"
    package = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if package and (extra := extra_of(package)):
        return f"the package {package!r} is not installed; it comes with: pip install 'persyn[{extra}]'"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}; check permissions, free space and PERSYN_HOME"
    return f"{type(error).__name__}: {error} (for a traceback: persyn --debug ...)"
