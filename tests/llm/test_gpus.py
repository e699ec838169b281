"""Parsing the output of `nvidia-smi`, simulated by a script, since machines without GPUs lack it."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from persyn.llm import gpus


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file with the script's output lines, whatever its arguments, which are written to `asked`."""
    answers = tmp_path / "answers"
    script = tmp_path / "nvidia-smi"
    script.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\ncat {answers}\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return answers


def test_each_line_is_a_gpu(smi: Path) -> None:
    smi.write_text("0\n1\n")
    assert gpus.ids() == ["0", "1"]


def test_memory_is_summed_over_the_gpus_asked_for(smi: Path) -> None:
    smi.write_text("100\n250\n")
    assert gpus.used_mib(["2", "3"]) == 350
    assert "--id=2,3" in (smi.parent / "asked").read_text()


def test_a_tool_that_tells_nothing_holds_nobody_up(smi: Path) -> None:
    smi.write_text("[N/A]\n")
    assert gpus.used_mib(["0"]) is None
    assert gpus.await_free(["0"], below_mib=0, seconds=60)


def test_gpus_are_named(smi: Path) -> None:
    smi.write_text("2, NVIDIA H100 80GB HBM3\n3, NVIDIA H100 80GB HBM3\n")
    assert gpus.names(["2", "3"]) == "2 NVIDIA H100 80GB HBM3; 3 NVIDIA H100 80GB HBM3"
    assert "--query-gpu=index,name" in (smi.parent / "asked").read_text()
    assert "--id=2,3" in (smi.parent / "asked").read_text()


def test_without_the_tool_there_are_no_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus.ids() == []
    assert gpus.used_mib(["0"]) is None
    assert gpus.names([]) is None


def test_memory_is_waited_for_until_it_is_free(smi: Path) -> None:
    smi.write_text("9000\n")
    assert not gpus.await_free(["0"], below_mib=500, seconds=0.1)
    threading.Timer(0.3, smi.write_text, ["400\n"]).start()
    assert gpus.await_free(["0"], below_mib=500, seconds=30)
