"""Only one package is installed, and users' own modules do not interfere with it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

HOSTILE = "raise SystemExit('a module of the user was imported in place of ours')\n"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from the present code."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("persyn", "cli", "workers", "migrations"):  # leftovers of a build would be included in the next one
        shutil.copytree(name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(name, folder)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "."]
    subprocess.run(build, cwd=folder, check=True, capture_output=True)
    return next(folder.glob("persyn-*.whl"))


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment into which the wheel alone is installed; its dependencies are found where they are."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin/python"), "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True, capture_output=True)
    (_packages(folder) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def _packages(environment: Path) -> Path:
    return next(environment.glob("lib/python*/site-packages"))


def test_one_top_level_package_is_installed_with_all_it_needs(environment: Path) -> None:
    installed = {path.name for path in _packages(environment).iterdir() if path.suffix not in (".dist-info", ".pth")}
    assert installed == {"persyn"}
    package = _packages(environment) / "persyn"
    here = {path.relative_to("persyn") for path in Path("persyn").rglob("*.py")}
    for link in ("cli", "workers", "migrations"):
        here |= {Path(link) / path.relative_to(link) for path in Path(link).rglob("*.py")}
    assert {path.relative_to(package) for path in package.rglob("*.py")} == here
    for data in ("py.typed", "cli/templates/fake.toml", "migrations/script.py.mako", "sql/queries/progress.sql"):
        assert (package / data).is_file()
    for data in ("report/templates/report.html.jinja", "web/templates/base.html", "web/static/console.css"):
        assert (package / data).is_file()


def test_modules_of_the_user_with_the_names_of_our_folders_disturb_nothing(environment: Path, tmp_path: Path) -> None:
    for name in ("cli", "console", "migrations", "workers"):
        (tmp_path / f"{name}.py").write_text(HOSTILE)
    variables = {**os.environ, "PYTHONPATH": str(tmp_path), "PERSYN_HOME": str(tmp_path / "home")}

    def persyn(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(environment / "bin/persyn"), *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done

    persyn("init", "--template", "fake", "run")
    persyn("run", "start", "run/run.toml")
    assert len((tmp_path / "home/datasets/fake/messages.jsonl").read_text().splitlines()) == 40
    where = [str(environment / "bin/python"), "-c", "import persyn.cli, persyn.migrations; print(persyn.cli.__file__)"]
    found = subprocess.run(where, cwd=tmp_path, env=variables, capture_output=True, text=True, check=True).stdout
    assert Path(found.strip()).is_relative_to(environment)
