"""Commands and their errors, as seen by a user."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from persyn.db.connect import Database
from tests.cli.conftest import Persyn
from tests.run_files import PROMPTS, TEACHERS, write_run


def require_refused(done: subprocess.CompletedProcess[str], *words: str, code: int = 2) -> None:
    """Require a one-line error without a traceback."""
    assert done.returncode == code, done.stderr
    (line,) = done.stderr.strip().splitlines()[-1:]
    assert line.startswith("error: ")
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in line


def test_a_run_goes_from_file_to_dataset_and_a_second_start_generates_nothing(persyn: Persyn, tmp_path: Path) -> None:
    file = str(write_run(tmp_path))
    first = persyn("run", "start", file)
    assert first.returncode == 0, first.stderr
    dataset = tmp_path / "home" / "datasets" / "test"
    rows = (dataset / "messages.jsonl").read_text().splitlines()
    assert len(rows) == PROMPTS

    again = persyn("run", "start", file)
    assert again.returncode == 0
    assert "loading" not in again.stderr
    assert (dataset / "messages.jsonl").read_text().splitlines() == rows


def test_progress_counts_each_failure_once(persyn: Persyn, tmp_path: Path) -> None:
    done = persyn("run", "start", str(write_run(tmp_path, options={"fail_every": 5})))
    assert done.returncode == 3, done.stderr
    (stage,) = [s for s in json.loads(persyn("run", "status", "test", "--json").stdout)["stages"] if s["failed"]][:1]
    said = [line for line in done.stderr.splitlines() if line.startswith(f"{stage['stage']}: ")]
    assert said[-1].endswith(f"{stage['failed']} failed")


def test_an_import_says_which_fields_there_are_and_takes_their_names(persyn: Persyn, tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("Question;Gold;ID\n2+2?;4;a\n3+3?;6;a\n")
    require_refused(
        persyn("prompts", "import", "p.csv"), "the row has 'Question', 'Gold', 'ID'", "use --map prompt=Question"
    )
    require_refused(persyn("prompts", "import", "p.csv", "--map", "teacher=Gold"), "FIELD is one of prompt, messages")
    twice = ("--map", "prompt=Question", "--map", "answer=Question")
    require_refused(persyn("prompts", "import", "p.csv", *twice), "the file's field Question twice")
    done = persyn("prompts", "import", "p.csv", "--map", "prompt=Question", "--map", "answer=Gold")
    assert done.stdout == "2 rows: 2 new, 0 already there, 0 bad\n"
    assert done.stderr == "ids of p.csv that several prompts have: 1, such as 'a'; every prompt was kept\n"


def test_a_run_that_lacks_many_rows_is_no_quiet_done(persyn: Persyn, tmp_path: Path) -> None:
    done = persyn("run", "start", str(write_run(tmp_path, options={"fail_every": 5})))
    lines = json.loads(persyn("run", "status", "test", "--json").stdout)["stages"]
    stage = next(stage for stage in lines if stage["stage"] == "generate")
    said = f"generate: {stage['failed']} of 60 rows failed ({stage['failed'] / 60:.1%}): refused {stage['failed']}"

    assert done.returncode == 3
    assert f"warning: {said}" in done.stderr
    assert "persyn jobs retry test --rows refused" in done.stderr
    assert persyn("run", "watch", "test").returncode == 3
    for command in (("audit", "test"), ("run", "status", "test")):
        assert said in persyn(*command).stdout.splitlines()


def test_rows_that_failed_are_asked_again_when_their_reason_is_named(persyn: Persyn, tmp_path: Path) -> None:
    persyn("run", "start", str(write_run(tmp_path, options={"fail_every": 5})))
    dataset = tmp_path / "home" / "datasets" / "test" / "messages.jsonl"
    before = len(dataset.read_text().splitlines())
    assert before < PROMPTS
    status = persyn("run", "status", "test").stdout
    assert ["generate", "refused", str(PROMPTS - before)] in [line.split() for line in status.splitlines()]
    require_refused(persyn("jobs", "retry", "test"), "done")
    refused = persyn("jobs", "retry", "test", "--rows", "server_error")
    require_refused(refused, "no failed row to retry for server_error")

    asked = persyn("jobs", "retry", "test", "--rows", "refused")
    pending = json.loads(persyn("run", "status", "test", "--json").stdout)["stages"][-1]["pending"]
    resumed = persyn("run", "resume", "test")

    assert asked.stdout.startswith(f"{PROMPTS - before} rows will be computed again\nrun test continues"), asked
    assert resumed.returncode == 3, resumed.stderr
    assert pending == PROMPTS - before
    # This engine refuses the same requests again.
    assert len(dataset.read_text().splitlines()) == before
    assert persyn("audit", "test").returncode == 0


def test_status_says_as_json_that_everything_adds_up(persyn: Persyn, tmp_path: Path) -> None:
    persyn("run", "start", str(write_run(tmp_path)))
    facts = json.loads(persyn("run", "status", "test", "--json").stdout)
    assert facts["state"] == "done"
    assert sum(teacher["assigned"] for teacher in facts["teachers"]) == PROMPTS
    for stage in facts["stages"]:
        assert stage["total"] == stage["done"] + stage["failed"] + stage["pending"]
        assert stage["pending"] == 0


def test_trace_tells_where_a_response_comes_from(persyn: Persyn, tmp_path: Path) -> None:
    persyn("run", "start", str(write_run(tmp_path)))
    row = json.loads((tmp_path / "home/datasets/test/messages.jsonl").read_text().splitlines()[-1])
    found = json.loads(persyn("trace", "test", str(row["prompt_id"]), "--json").stdout)
    assert found["teacher"] == row["teacher"]
    mine = [response for response in found["responses"] if response["teacher"] == row["teacher"]]
    assert mine[0]["text"] == row["messages"][-1]["content"]
    assert mine[0]["seed"] is not None
    assert {event["to_state"] for event in found["events"]} == {"running", "done"}


def test_audit_passes_a_run_that_was_worked_and_names_a_fault(persyn: Persyn, tmp_path: Path) -> None:
    persyn("run", "start", str(write_run(tmp_path, options={"fail_every": 5})))
    sound = persyn("audit", "test")
    assert (sound.returncode, sound.stdout.splitlines()[-1]) == (0, "run test is consistent"), sound.stdout
    assert json.loads(persyn("audit", "test", "--json").stdout) == []
    store = Database(f"sqlite:///{tmp_path / 'home' / 'persyn.db'}")
    with store.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE jobs SET fence = 9 WHERE id = 1")
    store.close()

    faulty = persyn("audit", "test")
    assert faulty.returncode == 1
    assert faulty.stdout.splitlines()[0] == "fence: job 1: it has fence 9, but its events say 1"
    found = {"rule": "fence", "about": "job 1", "found": "it has fence 9, but its events say 1"}
    assert json.loads(persyn("audit", "test", "--json").stdout) == [found]
    require_refused(persyn("audit", "nobody"), "nobody", "which has the run")


def test_sql_answers_and_cannot_write(persyn: Persyn, tmp_path: Path) -> None:
    persyn("prompts", "import", str(write_run(tmp_path).with_name("prompts.jsonl")))
    counted = persyn("sql", "select count(*) as n from prompts where text like '%:%' or 1=1", "--json")
    assert json.loads(counted.stdout) == [{"n": PROMPTS}]
    require_refused(persyn("sql", "delete from prompts"), "rejected the query")
    assert json.loads(persyn("sql", "select count(*) as n from prompts", "--json").stdout) == [{"n": PROMPTS}]


def test_sql_takes_one_statement_on_either_database(persyn: Persyn, database_url: str) -> None:
    url = {"PERSYN_DATABASE_URL": database_url}
    assert json.loads(persyn("sql", "select '%' as sign, 'a:b' as text", "--json", **url).stdout) == [
        {"sign": "%", "text": "a:b"}
    ]
    require_refused(persyn("sql", "rollback; begin; delete from runs; commit; select 1", **url), "error")
    require_refused(persyn("sql", "select 1; select 2", **url), "one statement")


def test_jobs_and_teachers_are_listed(persyn: Persyn, tmp_path: Path) -> None:
    persyn("run", "start", str(write_run(tmp_path)))
    jobs = json.loads(persyn("jobs", "list", "test", "--json").stdout)
    assert {job["state"] for job in jobs} == {"done"}
    teachers = json.loads(persyn("teachers", "list", "--json").stdout)
    assert [teacher["name"] for teacher in teachers] == list(TEACHERS)


def test_a_mistyped_key_is_named_with_the_one_that_was_meant(persyn: Persyn, tmp_path: Path) -> None:
    file = write_run(tmp_path, calibraton=3)
    require_refused(persyn("run", "start", str(file)), "calibraton", "did you mean 'calibration'")


def test_a_run_file_that_is_not_there(persyn: Persyn) -> None:
    require_refused(persyn("run", "start", "none.toml"), "none.toml", "persyn init")


def test_a_prompt_file_that_is_not_there(persyn: Persyn, tmp_path: Path) -> None:
    file = write_run(tmp_path)
    (tmp_path / "prompts.jsonl").unlink()
    require_refused(persyn("run", "start", str(file)), "prompts.jsonl")
    assert json.loads(persyn("run", "list", "--json").stdout) == []


def test_a_prompt_file_without_prompts(persyn: Persyn, tmp_path: Path) -> None:
    file = write_run(tmp_path)
    (tmp_path / "prompts.jsonl").write_text("")
    require_refused(persyn("run", "start", str(file)), "prompts.jsonl")
    assert json.loads(persyn("run", "list", "--json").stdout) == []


def test_a_model_that_does_not_exist(persyn: Persyn, tmp_path: Path) -> None:
    file = write_run(tmp_path)
    fake, missing = 'model = "ada"\nengine = "fake"', 'model = "./nowhere"\nengine = "transformers"'
    file.write_text(file.read_text().replace(fake, missing))
    require_refused(persyn("run", "start", str(file)), "nowhere", "no model")
    assert json.loads(persyn("run", "list", "--json").stdout) == []


def test_another_configuration_under_a_name_that_is_taken(persyn: Persyn, tmp_path: Path) -> None:
    persyn("run", "start", str(write_run(tmp_path)))
    file = write_run(tmp_path, alpha=0.9)
    require_refused(persyn("run", "start", str(file)), "run.alpha", "persyn run resume test")


def test_a_run_that_does_not_exist(persyn: Persyn) -> None:
    require_refused(persyn("run", "resume", "nobody"), "nobody", "PERSYN_HOME to use another store")


def test_a_store_that_is_made_was_empty(persyn: Persyn) -> None:
    assert persyn("db", "upgrade").stdout.endswith("(it was empty)\n")
    assert "it was" not in persyn("db", "upgrade").stdout


def test_several_that_come_first_make_one_store(persyn: Persyn) -> None:
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda _: persyn("prompts", "list"), range(4)))
    assert [(each.returncode, each.stderr) for each in done] == [(0, "")] * 4


def test_a_database_at_another_revision(persyn: Persyn, tmp_path: Path) -> None:
    persyn("run", "list")
    store = Database(f"sqlite:///{tmp_path / 'home' / 'persyn.db'}")
    with store.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    store.close()
    require_refused(persyn("run", "list"), "9999", "newer")


def test_a_database_that_does_not_answer_keeps_its_password_to_itself(persyn: Persyn) -> None:
    done = persyn("run", "list", PERSYN_DATABASE_URL="postgresql+psycopg://me:secret@127.0.0.1:1/none")
    require_refused(done, "cannot open the database", "PERSYN_DATABASE_URL")
    assert "secret" not in done.stderr


def test_hostile_text_is_shown_and_not_obeyed(persyn: Persyn, tmp_path: Path) -> None:
    hostile = "\x1b[2J[bold]<script>alert(1)</script>'; DROP TABLE prompts; --"
    (tmp_path / "bad.jsonl").write_text(json.dumps({"prompt": hostile, "id": "[red]x"}) + "\n")
    persyn("prompts", "import", "bad.jsonl")
    for command in (("prompts", "list"), ("prompts", "show", "1")):
        shown = persyn(*command).stdout
        assert "\x1b" not in shown
        assert "[bold]" in shown.replace("\n", "")
    assert persyn("prompts", "stats", "--json").returncode == 0


def test_teachers_check_finds_nothing_wrong_with_fakes(persyn: Persyn, tmp_path: Path) -> None:
    done = persyn("teachers", "check", str(write_run(tmp_path)), "--json")
    assert done.returncode == 0, done.stderr
    assert {row["model"] for row in json.loads(done.stdout)} == set(TEACHERS)


def test_doctor_finds_this_machine_fit(persyn: Persyn) -> None:
    done = persyn("doctor", "--json")
    assert done.returncode == 0, done.stdout
    assert {"store", "torch", "GPUs"} <= {row["what"] for row in json.loads(done.stdout)}


def test_help_answers_at_once_and_loads_no_heavy_library(persyn: Persyn) -> None:
    code = "import sys, cli.main; print(sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for library in ("torch", "transformers", "vllm", "sqlalchemy", "numpy", "rich"):
        assert f"'{library}'" not in loaded
    took = []
    for _ in range(3):
        began = time.monotonic()
        assert persyn("--help").returncode == 0
        took.append(time.monotonic() - began)
    # A generous bound; on a quiet machine it must be 0.3 s.
    assert min(took) < 1.5
