"""The files in deploy/ and docs/operations.md match the program, and contain no secrets."""

from __future__ import annotations

import configparser
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from persyn.cli.main import persyn

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
MANUAL = ROOT / "docs" / "operations.md"
FILES = sorted(path for path in DEPLOY.rglob("*") if path.is_file())
TEXTS = [*FILES, MANUAL]
UNITS = sorted(DEPLOY.rglob("*.service"))
SCRIPTS = sorted(DEPLOY.rglob("*.sbatch"))
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
#: Variables of the files themselves, which the program does not read.
OWN_VARIABLES = {"PERSYN_DATABASE_PASSWORD", "PERSYN_BROKER_PASSWORD", "PERSYN_ENVIRONMENT"}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def services() -> dict[str, dict[str, Any]]:
    services: dict[str, dict[str, Any]] = documents(DEPLOY / "compose.yaml")[0]["services"]
    return services


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    """The name and the pod of each workload."""
    for path in MANIFESTS:
        for document in documents(path):
            if "template" in document.get("spec", {}):
                yield document["metadata"]["name"], document["spec"]["template"]["spec"]


def unit(path: Path) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(delimiters=("=",), comment_prefixes=("#",), interpolation=None, strict=True)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string(path.read_text())
    return parser


def lines_of(path: Path) -> Iterator[str]:
    """Every command line shown in a text: in backticks, in a block, in a comment, or to be executed."""
    text = path.read_text()
    yield from re.findall(r"`(persyn [^`\n]+)`", text)
    # Matches after a comment's two spaces of indentation, an `exec` or a path; `  #` or five spaces end a command.
    for line in re.findall(r"^(?:#? {0,3}|exec |ExecStart=\S*/)(persyn [a-z].*)$", text, flags=re.MULTILINE):
        yield re.split(r"\s+#|\s{5,}", line)[0]


def command_lines() -> Iterator[tuple[str, list[str]]]:
    """The location of each command, and its words after `persyn`."""
    for path in TEXTS:
        for line in lines_of(path):
            yield name(path), shlex.split(line)[1:]
    for service, settings in services().items():
        if settings["image"].startswith("persyn:"):
            yield f"compose, {service}", settings["command"]
        if settings.get("healthcheck", {}).get("test", [])[:2] == ["CMD", "persyn"]:
            yield f"compose, health of {service}", settings["healthcheck"]["test"][2:]
    for workload, pod in pods():
        for container in pod["containers"]:
            yield f"kubernetes, {workload}", container["args"]


def problem(words: list[str]) -> str | None:
    """What is wrong with a command line; None if the program accepts it."""
    command: click.Command = persyn
    context = click.Context(persyn)
    words = list(words)
    while words and isinstance(command, click.Group) and not words[0].startswith("-"):
        found = command.get_command(context, words[0])
        if found is None:
            return f"no command {words[0]}"
        command, context = found, click.Context(found, parent=context, info_name=words.pop(0))
    try:
        values, left, _ = command.make_parser(context).parse_args(list(words))
    except click.UsageError as error:
        return error.format_message()
    if left:
        return f"{left} is too much"
    for parameter in command.get_params(context):
        value, kind = values.get(parameter.name or ""), parameter.type
        if isinstance(kind, click.Choice) and isinstance(value, str) and value not in kind.choices:
            return f"{parameter.name} cannot be {value}"
        is_given = isinstance(value, str | tuple) and len(value) > 0
        if isinstance(parameter, click.Argument) and parameter.required and words and not is_given:
            return f"{parameter.name} is missing"
    return None


def test_every_command_that_is_named_exists_with_its_options() -> None:
    lines = list(command_lines())

    assert len(lines) > 40
    assert {where for where, _ in lines} >= {
        "docs/operations.md",
        "deploy/systemd/persyn-worker@.service",
        "deploy/systemd/persyn-dispatch.service",
        "deploy/slurm/persyn-worker.sbatch",
        "compose, worker-gpu",
        "compose, health of dispatcher",
        "kubernetes, persyn-migrate",
    }
    assert [(where, words, wrong) for where, words in lines if (wrong := problem(words))] == []


@pytest.mark.parametrize(
    "line",
    ["werk", "worker --slot auto", "worker --slots all", "dispatch now", "jobs cancel first", "run resume --name x"],
)
def test_a_command_that_the_program_would_refuse_is_found(line: str) -> None:
    assert problem(line.split()) is not None


@pytest.mark.parametrize("path", [path for path in FILES if path.suffix == ".yaml"], ids=name)
def test_yaml_parses_into_mappings(path: Path) -> None:
    assert all(isinstance(document, dict) for document in documents(path))


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_a_script_is_valid_and_becomes_the_worker(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    text = path.read_text()
    assert "set -euo pipefail" in text
    assert text.rstrip().splitlines()[-1].startswith("exec persyn worker ")
    # The signal goes to the batch shell, which the worker replaces by exec.
    assert "#SBATCH --signal=B:TERM@120" in text


@pytest.mark.parametrize("path", UNITS, ids=name)
def test_a_unit_stops_its_process_alone_and_lets_it_finish(path: Path) -> None:
    parsed = unit(path)
    service = parsed["Service"]

    assert parsed.sections() == ["Unit", "Service", "Install"]
    assert (service["KillMode"], service["Restart"]) == ("mixed", "always")
    assert int(service["TimeoutStopSec"]) >= 30
    assert service["User"] == "persyn"
    assert service["EnvironmentFile"].startswith("/etc/")
    assert (service["NoNewPrivileges"], service["ProtectSystem"]) == ("yes", "strict")


def test_a_worker_unit_keeps_its_gpus_and_its_home() -> None:
    service = unit(DEPLOY / "systemd" / "persyn-worker@.service")["Service"]

    assert service["ExecStart"].endswith("worker --gpus %I")
    assert not {"PrivateDevices", "ProtectClock", "DevicePolicy", "MemoryDenyWriteExecute"} & set(service)
    assert service["ReadWritePaths"] == "/var/lib/persyn"


def test_every_port_is_published_on_loopback() -> None:
    ports = [port for service in services().values() for port in service.get("ports", [])]

    assert ports
    assert [port for port in ports if not str(port).startswith("127.0.0.1:")] == []
    for path in MANIFESTS:
        for document in documents(path):
            assert document.get("spec", {}).get("type", "ClusterIP") == "ClusterIP", name(path)
            assert "hostPort" not in path.read_text()


def test_a_service_waits_for_the_migration_and_stops_with_time() -> None:
    for service, settings in services().items():
        if not settings["image"].startswith("persyn:") or service == "migrate":
            continue
        assert settings["depends_on"]["migrate"] == {"condition": "service_completed_successfully"}, service
        assert "home:/var/lib/persyn" in settings["volumes"]
    assert {services()[worker]["stop_grace_period"] for worker in ("worker", "worker-gpu")} == {"2m"}


def test_every_pod_is_no_root_and_reads_its_urls_from_the_secret() -> None:
    listed = documents(DEPLOY / "kubernetes" / "kustomization.yaml")[0]
    found = dict(pods())

    assert {"kustomization.yaml", *listed["resources"]} == {path.name for path in MANIFESTS}
    assert len(found) == 5
    for workload, pod in found.items():
        assert pod["securityContext"]["runAsNonRoot"], workload
        for container in pod["containers"]:
            assert {"secretRef": {"name": "persyn"}} in container["envFrom"]
            assert container["image"] in {image["name"] for image in listed["images"]}
            assert "env" not in container
    assert all(pod["terminationGracePeriodSeconds"] >= 120 for key, pod in found.items() if "worker" in key)


def test_no_file_holds_a_secret_or_a_default_for_one() -> None:
    for path in TEXTS:
        # A mandatory variable is no secret; one with a default is left in place and checked.
        text = re.sub(r"\$\{\w+:\?[^}]*\}", "<given>", path.read_text())
        in_urls = re.findall(r"://[^\s/@:]*:([^\s@]+)@", text)
        called = r"\b(?!automount)\w*(?:password|token|secret_?key|api_?key|requirepass|auth)\b"
        by_name = re.findall(rf"(?im)^[^#\n]*{called}[\"']?[:= ][ \t]*(\S+)", text)
        found = in_urls + ([] if path == MANUAL else by_name)
        assert [value for value in found if value != "<given>"] == [], name(path)


def test_no_variable_is_named_that_the_program_does_not_read() -> None:
    read = set(re.findall(r"\bPERSYN_[A-Z_]+[A-Z]\b", (ROOT / "persyn" / "settings.py").read_text()))
    for path in TEXTS:
        named = set(re.findall(r"\bPERSYN_[A-Z_]+[A-Z]\b", path.read_text()))
        assert named <= read | OWN_VARIABLES, name(path)


def test_the_image_takes_what_the_dockerfile_copies() -> None:
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    copied = {
        word for line in re.findall(r"^COPY (?!--)(.+) \S+$", dockerfile, flags=re.MULTILINE) for word in line.split()
    }
    kept = set(re.findall(r"^!(\S+)$", (DEPLOY / "Dockerfile.dockerignore").read_text(), flags=re.MULTILINE))

    assert copied == kept
    assert all((ROOT / path).exists() for path in copied)
    packaged = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {name.rstrip("*") for name in packaged} <= copied
    assert "USER 10001:10001" in dockerfile
