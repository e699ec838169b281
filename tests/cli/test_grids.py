"""An imported grid, from file to comparison, on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from persyn.analysis.compare import Comparison, StrategyFacts
from persyn.cli import compare
from persyn.method.intervals import Interval
from persyn.router.kinds.registry import ROUTERS
from tests.cli.conftest import Persyn

TEACHERS = ("lab/ada", "lab/bob", "lab/cyd")


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    """Forty prompts answered by three teachers, each of which is best on every third."""
    rows = [
        {"question": f"What is {n}?", "model": name, "output": f"{name} says {n}.", "right": n % 3 == k, "tokens": 4}
        for n in range(40)
        for k, name in enumerate(TEACHERS)
    ]
    path = tmp_path / "grid.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def teachers(tmp_path: Path) -> Path:
    path = tmp_path / "teachers.toml"
    path.write_text(
        "".join(
            f'[[teachers]]\nname = "{name}"\nfamily = "f{size}"\nparams_b = {size}\nprice_in = 1\nprice_out = {size}\n'
            for size, name in enumerate(TEACHERS, 1)
        )
    )
    return path


def run_file(folder: Path, router: str = 'backbone = "backbone"\nengine = "fake"') -> Path:
    text = (
        '[run]\nname = "grid"\nsetting = "instruct"\ncalibration = 40\nholdout = 0.5\n'
        '[prompts]\nsource = "grid.jsonl"\n'
        '[student]\nname = "student"\nmodel = "student"\nengine = "fake"\nfamily = "f2"\n'
        '[quality]\nkind = "imported"\nmodel = "right"\n'
        f"[router]\n{router}\n"
    )
    text += "".join(f'[[teachers]]\nname = "{name}"\nmodel = "{name}"\nengine = "imported"\n' for name in TEACHERS)
    path = folder / "run.toml"
    path.write_text(text)
    return path


def test_from_a_grid_to_a_comparison(persyn: Persyn, tmp_path: Path, grid: Path, teachers: Path) -> None:
    assert persyn("db", "upgrade").returncode == 0
    names = "--map", "prompt=question", "--map", "response_tokens=tokens", "--score", "right"
    imported = persyn("responses", "import", str(grid), "--teachers", str(teachers), *names)
    assert imported.returncode == 0, imported.stderr
    assert imported.stdout.startswith("120 rows: 120 new, 0 already there, 0 bad")

    started = persyn("run", "start", str(run_file(tmp_path)))
    assert started.returncode == 0, started.stderr
    dataset = (tmp_path / "home" / "datasets" / "grid" / "messages.jsonl").read_text().splitlines()
    assert len(dataset) == 40

    table = persyn("compare", "grid")
    assert table.returncode == 0, table.stderr
    assert "20 hold-out prompts, 20 calibration prompts" in table.stdout
    foreign = "persyn: the router was fitted to the run's own reward, not to this one"
    assert foreign not in table.stdout
    assert foreign in persyn("compare", "grid", "--per", "response").stdout

    (quality, both) = json.loads(persyn("compare", "grid", "--alpha", "0,0.4", "--json").stdout)
    assert (quality["alpha"], both["alpha"]) == (0.0, 0.4)
    assert (quality["is_own"], both["is_own"]) == (False, True)
    by_name = {row["strategy"]: row for row in quality["strategies"]}
    assert set(by_name) == {"persyn", "static", "strong", "family-strong", "mix", "car", "random", "oracle"}
    assert by_name["strong"]["shares"] == {"lab/cyd": 1.0}
    assert by_name["family-strong"]["shares"] == {"lab/bob": 1.0}
    assert by_name["oracle"]["quality"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert by_name["random"]["quality"]["mean"] == pytest.approx(1 / 3)
    assert by_name["oracle"]["tokens"] == 40 * 3 * 4
    assert by_name["strong"]["tokens"] == 40 * 4
    assert by_name["oracle"]["cost"] is None  # the prompts' tokens are unknown


def test_a_router_is_shown_and_fitted_anew_in_seconds(persyn: Persyn, tmp_path: Path, grid: Path, tiny: Path) -> None:
    assert persyn("db", "upgrade").returncode == 0
    assert persyn("responses", "import", str(grid), "--map", "prompt=question", "--score", "right").returncode == 0
    router = f'kind = "head"\nbackbone = "{tiny}"\ntune = "head"'
    started = persyn("run", "start", str(run_file(tmp_path, router)))
    assert started.returncode == 0, started.stderr
    (kept,) = (tmp_path / "home" / "features").glob("*/*.safetensors")

    shown = json.loads(persyn("router", "show", "grid", "--json").stdout)
    assert (shown["tune"], shown["n_calibration"], shown["n_holdout"]) == ("head", 20, 20)

    said = persyn("router", "show", "grid").stdout
    names = [line.split()[0] for line in said.splitlines()[-4:]]
    assert names == ["router", "static", "random", "oracle"]
    assert "calibration_error" in said

    found = json.loads(persyn("router", "curve", "grid", "--json").stdout)
    assert [point["n_calibration"] for point in found["points"]] == [20]
    assert found["points"][-1]["reward"] == pytest.approx(shown["router"]["routed_reward"])
    assert found["verdict"] == "too few calibration prompts for a conclusion"

    compared = json.loads(persyn("compare", "grid", "--refit", "--alpha", "0.4,1", "--json").stdout)
    by_name = [{row["strategy"]: row for row in one["strategies"]} for one in compared]
    # At the run's own alpha the refitted head equals the run's router.
    assert by_name[0]["head"]["reward"] == by_name[0]["persyn"]["reward"]
    assert {name for name in ROUTERS if name != "static"} <= by_name[1].keys()
    assert list((tmp_path / "home" / "features").glob("*/*.safetensors")) == [kept]  # features were not computed again


def fact(strategy: str, **shares: float) -> StrategyFacts:
    some = Interval(0.5, 0.4, 0.6)
    return StrategyFacts(strategy, some, some, some, some, None, None, None, shares)


@pytest.mark.parametrize(
    ("share", "of_oracle", "n", "is_named"),
    [
        pytest.param(0.95, 0.6, 50, True, id="nearly all to one teacher"),
        pytest.param(0.85, 0.6, 50, False, id="to several"),
        pytest.param(0.95, 0.6, 49, False, id="too few prompts to tell"),
        pytest.param(0.95, 0.95, 50, False, id="one teacher is the best nearly everywhere"),
    ],
)
def test_a_router_that_barely_distinguishes_between_prompts_is_named(
    capsys: pytest.CaptureFixture[str], share: float, of_oracle: float, n: int, is_named: bool
) -> None:
    facts = [fact("persyn", ada=share, bob=1 - share), fact("oracle", ada=of_oracle, bob=1 - of_oracle)]
    compare._show([Comparison("run", 0.4, "minmax", "token", "both", True, n, 20, facts, [])])
    said = capsys.readouterr().out
    assert ("persyn nearly always chooses ada: it barely distinguishes between these prompts" in said) is is_named


def test_several_runs_are_compared_in_one_table(capsys: pytest.CaptureFixture[str]) -> None:
    facts = [fact("static", ada=1.0), fact("oracle", ada=0.5, bob=0.5)]
    skipped = ["persyn: no router"]
    runs = [Comparison(name, 0.4, "minmax", "token", "both", True, 50, 20, facts, skipped) for name in "xy"]
    compare._show(runs)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    (header,) = [number for number, words in enumerate(lines) if words[:3] == ["run", "strategy", "reward"]]
    of_table = [words[:2] for words in lines[header + 1 : header + 5]]
    assert of_table == [["x", "static"], ["x", "oracle"], ["y", "static"], ["y", "oracle"]]
    assert ["y", "oracle", "ada", "50%,", "bob", "50%"] in lines
    assert lines[-1] == ["y,", "alpha", "0.4:", "unavailable:", "persyn:", "no", "router"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("responses", "import", "grid.jsonl", "--map", "prompt"), "--map takes FIELD=NAME"),
        (("responses", "import", "grid.jsonl", "--map", "text=question"), "--map takes FIELD=NAME"),
        (("responses", "import", "grid.jsonl"), "neither 'prompt' nor 'messages'"),
        (("responses", "import", "none.jsonl"), "there is no file none.jsonl"),
        (("responses", "import", "grid.jsonl", "--teachers", "none.toml"), "cannot read the teachers' file none.toml"),
        (
            ("responses", "import", "grid.jsonl", "--map", "prompt=question", "--score", "rihgt"),
            "no row has a score in",
        ),
        (("router", "curve", "grid"), "there is no run named 'grid'"),
        (("compare", "grid"), "there is no run named 'grid'"),
        (("compare", "grid", "--alpha", "2"), "--alpha takes numbers from 0 to 1"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(persyn: Persyn, grid: Path, words: tuple[str, ...], said: str) -> None:
    assert grid.exists()
    assert persyn("db", "upgrade").returncode == 0
    done = persyn(*words)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_quality_that_was_not_imported_stops_the_start_and_may_come_later(
    persyn: Persyn, tmp_path: Path, grid: Path
) -> None:
    names = "responses", "import", str(grid), "--map", "prompt=question"
    assert persyn(*names).returncode == 0
    refused = persyn("run", "start", str(run_file(tmp_path)))
    assert refused.returncode == 2
    assert "no score 'right' was imported; available: none." in refused.stderr
    again = persyn(*names, "--score", "right")
    assert again.stdout.startswith("120 rows: 0 new, 120 already there, 0 bad; 120 new scores"), again.stderr
    assert persyn("run", "start", str(run_file(tmp_path))).returncode == 0


def test_a_mistake_in_the_teachers_file_is_named(persyn: Persyn, tmp_path: Path, grid: Path) -> None:
    (tmp_path / "teachers.toml").write_text('[[teachers]]\nname = "lab/ada"\nparam_b = 3\n')
    assert persyn("db", "upgrade").returncode == 0
    done = persyn("responses", "import", str(grid), "--teachers", "teachers.toml")
    assert done.returncode == 2
    assert "teacher lab/ada: unknown key 'param_b' in [[teachers]]; did you mean 'params_b'?" in done.stderr
