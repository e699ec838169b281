"""[fallback] and `generation.check` in run files: what is refused, and that other configurations stay as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from persyn.config import RunConfig, load_config
from persyn.db.connect import Database
from persyn.errors import UsageError
from persyn.runs import pipeline, run_file
from tests.run_files import write_run


def read(folder: Path, more: str, quality: str = 'kind = "math"') -> RunConfig:
    file = write_run(folder)
    text = file.read_text().replace('[quality]\nkind = "fake"', f"[quality]\n{quality}")
    file.write_text(text + more)
    return run_file.read(file)


def test_keys_that_are_not_set_are_not_stored(tmp_path: Path) -> None:
    frozen = read(tmp_path, "").frozen()

    assert "fallback" not in frozen
    assert not {"check", "when_worse"} & frozen["generation"].keys()


def test_keys_that_are_set_are_part_of_the_configuration(tmp_path: Path) -> None:
    plain = read(tmp_path, "")
    found = read(tmp_path, '[generation]\ncheck = true\n[fallback]\nattempts = 2\non = ["wrong"]\n')

    assert found.digest() != plain.digest()
    assert load_config(found.frozen()) == found
    assert found.frozen()["fallback"] == {"attempts": 2, "on": ["wrong"]}


def test_by_default_a_failed_or_truncated_response_has_one_second_choice(tmp_path: Path) -> None:
    table = read(tmp_path, "[fallback]\n").fallback

    assert table is not None
    assert (table.attempts, table.on) == (1, ["failed", "truncated"])


@pytest.mark.parametrize(
    ("more", "quality", "why"),
    [
        ('[fallback]\non = ["wrong"]\n', 'kind = "math"', r"set \[generation\] check = true"),
        (
            '[generation]\ncheck = true\n[fallback]\non = ["wrong"]\n',
            'kind = "fake"',
            "fake does not say what is right",
        ),
        ("[generation]\ncheck = true\n", 'kind = "imported"\nmodel = "score"', "no score of new responses"),
        (
            '[fallback]\non = ["slow"]\n',
            'kind = "math"',
            "allowed: 'failed', 'refused', 'too_long', 'trunc",
        ),
        ('[generation]\nwhen_worse = "stop"\n', 'kind = "math"', r"set \[generation\] check = true"),
        (
            '[generation]\ncheck = true\nkeep = "correct"\nwhen_worse = "stop"\n',
            'kind = "math"',
            "without a choice among samples",
        ),
        ("[fallback]\non = []\n", 'kind = "math"', "fallback.on"),
        ("[fallback]\nattempts = 0\n", 'kind = "math"', "`fallback.attempts` must be an integer >= 1, got 0"),
    ],
)
def test_a_table_that_cannot_be_meant_is_refused(tmp_path: Path, more: str, quality: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        read(tmp_path, more, quality)


def test_a_new_run_with_checks_stops_a_worse_teacher_an_old_one_stays_and_both_may_be_changed(
    database: Database, tmp_path: Path
) -> None:
    config = read(tmp_path, "[generation]\ncheck = true\n", 'kind = "fake"')
    with database.write() as session:
        run = pipeline.start_run(session, config, actor="me")
        assert run.config["generation"]["when_worse"] == "stop"
        assert pipeline.start_run(session, config, actor="me").id == run.id
        assert run.config["generation"]["when_worse"] == "stop"

        old = {name: value for name, value in run.config["generation"].items() if name != "when_worse"}
        run.config = {**run.config, "generation": old}
        pipeline.start_run(session, config, actor="me")
        assert run.config["generation"] == old
        told = replace(config, generation=replace(config.generation, when_worse="report"))
        assert pipeline.start_run(session, told, actor="me").id == run.id
        assert run.config["generation"]["when_worse"] == "report"
