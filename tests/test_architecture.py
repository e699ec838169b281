"""Properties of the code base as a whole."""

from __future__ import annotations

import subprocess
import sys

import click
import pytest

from persyn.cli.main import persyn


def commands(group: click.Group, path: str = "persyn") -> list[tuple[str, click.Command]]:
    """Every command below a group, by its full name."""
    context = click.Context(group)
    found: list[tuple[str, click.Command]] = []
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        found.append((f"{path} {name}", command))
        if isinstance(command, click.Group):
            found += commands(command, f"{path} {name}")
    return found


def test_every_command_and_group_has_a_help_text() -> None:
    assert all(command.help for _, command in commands(persyn))


@pytest.mark.parametrize(
    "module",
    [
        "persyn.workers.runner.worker",
        "persyn.workers.cluster.serve",
        "persyn.workers.cluster.dispatch",
        "persyn.runs.pipeline",
        "persyn.cli.run",
        "persyn.cli.plan",
    ],
)
def test_who_runs_models_loads_none_of_their_libraries(module: str) -> None:
    """A worker that imported torch would occupy memory, and a GPU, in addition to the engine host."""
    code = f"import sys, {module}; print([m for m in ('torch', 'transformers', 'vllm') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("modules", "unused"),
    [
        ("persyn.llm.fake", ("numpy", "jinja2", "importlib.metadata", "torch")),
        ("persyn.router.fit, persyn.router.route", ("transformers", "sklearn", "scipy")),
    ],
)
def test_a_host_imports_no_library_that_its_engine_may_not_use(modules: str, unused: tuple[str, ...]) -> None:
    """A worker starts a host for each model, so what all of them import is paid for again and again."""
    code = f"import sys, persyn.llm.host, {modules}; print([m for m in {unused} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
