"""Only one package is installed, and users' own modules do not interfere with it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
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
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with only the wheel installed."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder)
    return folder


def test_one_top_level_package_is_installed_with_all_it_needs(installed: Path) -> None:
    assert {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")} == {"persyn"}
    package = installed / "persyn"
    here = {path.relative_to("persyn") for path in Path("persyn").rglob("*.py")}
    for link in ("cli", "workers", "migrations"):
        here |= {Path(link) / path.relative_to(link) for path in Path(link).rglob("*.py")}
    assert {path.relative_to(package) for path in package.rglob("*.py")} == here
    for data in ("py.typed", "cli/templates/fake.toml", "migrations/script.py.mako", "sql/queries/progress.sql"):
        assert (package / data).is_file()
    for data in ("report/templates/report.html.jinja", "web/templates/base.html", "web/static/console.css"):
        assert (package / data).is_file()


def test_modules_of_the_user_with_the_names_of_our_folders_disturb_nothing(installed: Path, tmp_path: Path) -> None:
    for name in ("cli", "console", "migrations", "workers"):
        (tmp_path / f"{name}.py").write_text(HOSTILE)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{installed}", "PERSYN_HOME": str(tmp_path / "home")}

    def persyn(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", "from persyn.cli.main import main; main()", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done

    persyn("init", "--template", "fake", "run")
    persyn("run", "start", "run/run.toml")
    assert len((tmp_path / "home/datasets/fake/messages.jsonl").read_text().splitlines()) == 40
    where = [sys.executable, "-c", "import persyn.cli, persyn.migrations; print(persyn.cli.__file__)"]
    found = subprocess.run(where, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    assert Path(found.strip()).is_relative_to(installed)
