"""`persyn report` on the command line."""

from __future__ import annotations

from pathlib import Path

from persyn.db.connect import Database
from tests.cli.conftest import Persyn
from tests.factories import make_run


def test_a_report_is_written_with_its_figures_or_refused_with_a_reason(persyn: Persyn, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'persyn.db'}"
    database = Database(url)
    database.upgrade()
    with database.write() as session:
        make_run(session, name="first", prompts=4, calibration=1, holdout=1)
    database.close()

    done = persyn("report", "first", "-o", "r.md", "--figures", "figures", PERSYN_DATABASE_URL=url)
    refused = persyn("report", "first", "--format", "html", "-o", "persyn.db", PERSYN_DATABASE_URL=url)

    strange = persyn("report", "first", "-o", "r.pdf", PERSYN_DATABASE_URL=url)

    assert (strange.returncode, (tmp_path / "r.pdf").exists()) == (2, False)
    assert strange.stderr.startswith("error: a report is HTML or Markdown, not .pdf; ")
    assert (done.returncode, done.stdout) == (0, "r.md: run first, running, 0 figures\n")
    assert (tmp_path / "r.md").read_text().startswith("<!-- PerSyn report -->\n# Run first\n")
    assert (tmp_path / "figures").is_dir()
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == "error: persyn.db is not a PerSyn report and was not replaced; give another -o\n"
