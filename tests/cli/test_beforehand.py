"""Preflight checks for new users, and restarts of an existing run."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chat_server import Server, completion, error
from tests.cli.conftest import Persyn
from tests.cli.test_commands import require_refused
from tests.run_files import PROMPTS, write_run


def with_quality(file: Path, quality: str) -> str:
    file.write_text(file.read_text().replace('[quality]\nkind = "fake"', f"[quality]\n{quality}"))
    return str(file)


def with_teacher(file: Path, table: str) -> str:
    """Replace the first teacher."""
    text = file.read_text().replace('model = "ada"\nengine = "fake"\ngpus = 0', table)
    head, _, tail = text.partition(table)
    file.write_text(head + table + tail.replace("options = {  }", "", 1))
    return str(file)


def with_backbone(text: str, model: str) -> str:
    """A run file's text with a real router on this backbone."""
    return re.sub(r'backbone = "backbone"\nengine = "fake"\n(options = .*\n)?', f'backbone = "{model}"\n', text)


def rows_of(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def write_rows(file: Path, rows: list[dict[str, object]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def without(folder: Path, field: str, *, every: int = 1) -> None:
    rows = rows_of(folder / "prompts.jsonl")
    for row in rows[::every]:
        row.pop(field, None)
    write_rows(folder / "prompts.jsonl", rows)


JUDGE = 'kind = "judge"\nmodel = "j"\noptions = { engine = "fake", against = "answer" }'


@pytest.mark.parametrize("quality", ['kind = "math"', JUDGE])
def test_prompts_without_any_answer_are_refused_where_the_quality_needs_one(
    persyn: Persyn, tmp_path: Path, quality: str
) -> None:
    file = with_quality(write_run(tmp_path), quality)
    without(tmp_path, "answer")
    for command in (("plan",), ("run", "start")):
        require_refused(
            persyn(*command, file), "none of the 60 prompts has a reference answer", "'answer'", "[quality]"
        )
    assert not list(tmp_path.glob("home/datasets/*"))


def test_prompts_without_instructions_are_refused_where_they_are_checked(persyn: Persyn, tmp_path: Path) -> None:
    file = with_quality(write_run(tmp_path), 'kind = "instructions"')
    require_refused(persyn("run", "start", file), "none of the 60 prompts", "'instruction_id_list'")


def test_where_some_answers_are_missing_calibration_is_drawn_from_the_others(persyn: Persyn, tmp_path: Path) -> None:
    file = with_quality(write_run(tmp_path), 'kind = "math"')
    without(tmp_path, "answer", every=3)
    said = "20 of 60 prompts have no reference answer"
    assert said in persyn("plan", file).stderr
    done = persyn("run", "start", file)
    assert done.returncode == 0, done.stderr
    assert said in done.stderr
    assert "no_reference_answer" not in done.stdout


def test_prompts_in_a_field_of_another_name_are_imported_as_the_refusal_says(persyn: Persyn, tmp_path: Path) -> None:
    file = write_run(tmp_path)
    prompts = tmp_path / "prompts.jsonl"
    write_rows(prompts, [{"question": row["prompt"]} for row in rows_of(prompts)])
    for command in (("plan",), ("run", "start")):
        said = ("[prompts] file: ", "'persyn prompts import FILE --map prompt=question'", 'source = "prompts.jsonl"')
        require_refused(persyn(*command, str(file)), *said)
    assert persyn("prompts", "import", str(prompts), "--map", "prompt=question").returncode == 0
    file.write_text(file.read_text().replace('file = "prompts.jsonl"', 'source = "prompts.jsonl"'))
    assert persyn("plan", str(file)).returncode == 0


def test_too_few_prompts_with_an_answer_are_refused_with_both_numbers(persyn: Persyn, tmp_path: Path) -> None:
    file = with_quality(write_run(tmp_path, calibration=50), 'kind = "math"')
    without(tmp_path, "answer", every=3)
    require_refused(persyn("run", "start", file), "20 of the 60 prompts", "50 calibration prompts", "the remaining 40")


def test_one_teacher_under_two_names_is_named(persyn: Persyn, tmp_path: Path) -> None:
    file = write_run(tmp_path)
    file.write_text(file.read_text().replace('model = "bob"', 'model = "ada"'))
    for command in (("plan",), ("run", "start")):
        require_refused(persyn(*command, str(file)), "'ada' and 'bob' are the same teacher: the same model 'ada'")


def test_every_model_that_is_missing_is_named_in_one_go(persyn: Persyn, tmp_path: Path) -> None:
    missing = 'model = "{}"\nengine = "transformers"\ngpus = 0'
    file = Path(with_teacher(write_run(tmp_path), missing.format("nobody/first")))
    text = file.read_text().replace('model = "bob"\nengine = "fake"\ngpus = 0', missing.format("./nowhere"))
    file.write_text(with_backbone(text, "nobody/third").replace("options = {  }", ""))
    require_refused(persyn("run", "start", str(file)), "3 are missing", "nobody/first", "nowhere", "nobody/third")


SERVER = 'model = "m"\nengine = "openai"\ngpus = 0\noptions = {{ base_url = "{url}"{more} }}'


def a_free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@pytest.fixture
def server() -> Iterator[Server]:
    with Server.running() as found:
        yield found


@pytest.mark.parametrize("command", ["plan", "run start"])
def test_a_key_that_is_missing_and_a_port_where_nobody_listens(persyn: Persyn, tmp_path: Path, command: str) -> None:
    url = f"http://127.0.0.1:{a_free_port()}/v1"
    no_key = with_teacher(write_run(tmp_path), SERVER.format(url=url, more=', api_key_env = "NO_SUCH_KEY"'))
    require_refused(persyn(*command.split(), no_key), "teacher ada", "NO_SUCH_KEY")
    (tmp_path / "other").mkdir()
    nobody = with_teacher(write_run(tmp_path / "other"), SERVER.format(url=url, more=""))
    refused = persyn(*command.split(), nobody)
    require_refused(refused, "teacher ada", url.removesuffix("/v1"), "Connection refused")
    assert ("at an even split" in refused.stdout) is (command == "plan")  # plan prints its figures all the same


def test_a_ping_tells_an_expired_key_from_a_good_one(persyn: Persyn, tmp_path: Path, server: Server) -> None:
    file = with_teacher(write_run(tmp_path), SERVER.format(url=server.base_url, more=""))
    options = f'{{ engine = "openai", options = {{ base_url = "{server.base_url}" }} }}'
    with_quality(Path(file), f'kind = "judge"\nmodel = "j"\noptions = {options}')
    assert persyn("teachers", "check", file).returncode == 0
    assert server.bodies == []

    done = persyn("teachers", "check", file, "--ping", "--json")
    pings = {row["model"]: row[""] for row in json.loads(done.stdout) if row["what"] == "ping"}
    assert (done.returncode, pings) == (0, {"ada": "ok", "the judge": "ok"})
    assert [(body["model"], body["max_tokens"]) for body in server.bodies] == [("j", 16), ("m", 16)]

    server.reply = lambda n: error(401, "the key has expired")
    done = persyn("teachers", "check", file, "--ping")
    assert done.returncode == 1
    assert "the key has expired" in done.stdout
    server.reply = lambda n: completion("", "length")  # a model that reasons first writes no text in so few tokens
    assert persyn("teachers", "check", file, "--ping").returncode == 0


def test_gpus_that_are_not_there(persyn: Persyn, tmp_path: Path, a_model: Path) -> None:
    file = with_teacher(write_run(tmp_path), f'model = "{a_model}"\nengine = "transformers"\ngpus = 1')
    said = ("teacher ada", "gpus = 1", "no GPU is visible", "set gpus = 0 in [teachers]")
    require_refused(persyn("run", "start", file, CUDA_VISIBLE_DEVICES=""), *said)
    assert "no GPU is visible" in persyn("teachers", "check", file, CUDA_VISIBLE_DEVICES="").stdout


@pytest.fixture
def a_model(tmp_path: Path) -> Path:
    """Enough of a model to estimate its memory: 100 GiB of weights that do not exist."""
    folder = tmp_path / "a_model"
    folder.mkdir()
    config = {"num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "hidden_size": 8192}
    config |= {"max_position_embeddings": 131072, "dtype": "bfloat16", "model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def weigh(model: Path, gib: float) -> None:
    index = {"metadata": {"total_size": int(gib * 2**30)}, "weight_map": {}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def with_smi(folder: Path, *mib: int) -> str:
    """A PATH with an `nvidia-smi` that reports GPUs of the given memory."""
    tool = folder / "bin" / "nvidia-smi"
    tool.parent.mkdir(exist_ok=True)
    lines = [
        "#!/bin/sh",
        'case "$1" in',
        *(
            f"*{what}*) printf '{''.join(f'{value}{chr(92)}n' for value in values)}' ;;"
            for what, values in (("memory.total", mib), ("index", range(len(mib))))
        ),
        "esac",
    ]
    tool.write_text("\n".join(lines) + "\n")
    tool.chmod(0o755)
    return f"{tool.parent}:{os.environ['PATH']}"


def test_memory_that_does_not_do_is_told_in_the_run_file_s_own_words(
    persyn: Persyn, tmp_path: Path, a_model: Path
) -> None:
    weigh(a_model, 5000)
    file = with_teacher(write_run(tmp_path), f'model = "{a_model}"\nengine = "transformers"\ngpus = 0')
    require_refused(persyn("run", "start", file), "teacher ada", "10,000.0 GiB in float32", "this host has")

    weigh(a_model, 30)
    path = with_smi(tmp_path, 40_000, 40_000)
    (tmp_path / "vllm").mkdir()
    teacher = f'model = "{a_model}"\nengine = "vllm"\ngpus = {{}}'
    on_one = with_teacher(write_run(tmp_path / "vllm"), teacher.format(1))
    refused = persyn("run", "start", on_one, PATH=path)
    require_refused(refused, "131,072 tokens takes 40.0 GiB", "options.max_model_len", "options.gpu_memory_utilization")
    weigh(a_model, 100)
    require_refused(
        persyn("run", "start", on_one, PATH=path), "100.0 GiB in bfloat16", "gpu_memory_utilization = 0.9", "more gpus"
    )


def test_a_day_on_the_cpu_of_a_host_with_gpus_is_told_of(persyn: Persyn, tmp_path: Path, a_model: Path) -> None:
    weigh(a_model, 0.001)
    file = write_run(tmp_path)
    text = file.read_text().replace('model = "student"\nengine = "fake"', f'model = "{a_model}"')
    file.write_text(with_backbone(text, str(a_model)))
    path = with_smi(tmp_path, 40_000)
    for command in (("plan", str(file)), ("doctor", str(file))):
        done = persyn(*command, PATH=path)
        said = " ".join((done.stdout + done.stderr).split())
        assert "the student" in said, said
        assert "the router" in said
        assert "set gpus = 1 in [student]" in said
        assert "set gpus = 1 in [router]" in said
    assert "gpus" not in persyn("plan", str(file), CUDA_VISIBLE_DEVICES="").stderr


def started(persyn: Persyn, file: Path | str) -> None:
    done = persyn("run", "start", str(file))
    assert done.returncode == 0, done.stderr


def test_a_prompts_file_that_has_grown_is_noticed(persyn: Persyn, tmp_path: Path) -> None:
    file = write_run(tmp_path)
    started(persyn, file)
    prompts = tmp_path / "prompts.jsonl"
    rows = rows_of(prompts)
    write_rows(prompts, [*rows[2:], *({"prompt": f"new {n}"} for n in range(300))])
    said = ("prompts.jsonl changed", "300 prompts are new", "2 of the run's", "persyn run extend test FILE")
    require_refused(persyn("run", "start", str(file)), *said)
    require_refused(persyn("plan", str(file)), *said)
    resumed = persyn("run", "resume", "test")
    assert resumed.returncode == 0
    assert "300 prompts are new" in resumed.stderr

    write_rows(prompts, rows[::-1])  # the same conversations in another order are the same prompts
    started(persyn, file)


def test_a_project_that_moved_is_the_same_run(persyn: Persyn, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    started(persyn, write_run(here))
    shutil.move(here, there)
    started(persyn, there / "run.toml")
    assert [row["name"] for row in json.loads(persyn("run", "list", "--json").stdout)] == ["test"]
    (there / "prompts.jsonl").rename(there / "renamed.jsonl")
    file = there / "run.toml"
    file.write_text(file.read_text().replace("prompts.jsonl", "renamed.jsonl"))
    started(persyn, file)


def test_what_describes_a_teacher_may_change_and_what_decides_is_refused_with_both_values(
    persyn: Persyn, tmp_path: Path
) -> None:
    file = write_run(tmp_path)
    started(persyn, file)
    text = file.read_text()
    text = text.replace("calibration = 12", "calibration = 12\noutage_seconds = 60")
    file.write_text(
        text.replace('family = "ada"\nparams_b = 1', 'family = "new"\nlicense = "MIT"\nprice_in = 1.5\nprice_out = 3')
    )
    started(persyn, file)
    (run,) = json.loads(persyn("sql", "select config from runs", "--json").stdout)
    assert '"outage_seconds":60.0' in json.dumps(run).replace("\\", "").replace(" ", "")
    (row,) = json.loads(persyn("sql", "select family, license, price_in from teachers where id = 1", "--json").stdout)
    assert row == {"family": "new", "license": "MIT", "price_in": 1.5}

    file.write_text(file.read_text().replace("calibration = 12", "calibration = 20").replace('"cyd"', '"cid"'))
    refused = persyn("run", "start", str(file))
    require_refused(refused, "run.calibration was 12 and is 20", "teachers[2].model was 'cyd' and is 'cid'")


def test_what_a_strategy_goes_by_may_not_change(persyn: Persyn, tmp_path: Path) -> None:
    file = write_run(tmp_path, strategy="mix")
    started(persyn, file)
    file.write_text(file.read_text().replace("params_b = 3", "params_b = 30"))
    require_refused(persyn("run", "start", str(file)), "teachers[2].params_b was 3.0 and is 30.0")


def test_scores_that_failed_for_want_of_an_answer_are_made_once_it_is_there(persyn: Persyn, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    write_run(tmp_path / "whole")
    file = with_quality(write_run(tmp_path, strategy="oracle"), 'kind = "math"')
    without(tmp_path, "answer", every=2)
    done = persyn("run", "start", file)
    assert done.returncode == 3, done.stderr  # done, with missing rows
    assert f"30 of {PROMPTS} prompts have no reference answer" in done.stderr
    failed = "select count(*) as n from scores where failure like 'no_reference_answer%'"

    def count() -> int:
        return int(json.loads(persyn("sql", failed, "--json").stdout)[0]["n"])

    assert count() == 90
    refused = persyn("jobs", "retry", "test", "--rows", "no_reference_answer")
    assert refused.returncode == 2
    assert persyn("prompts", "import", "whole/prompts.jsonl").returncode == 0
    assert "90 rows will be computed again" in persyn("jobs", "retry", "test", "--rows", "no_reference_answer").stdout
    assert persyn("run", "resume", "test").returncode == 0
    assert count() == 0

    # Adding answers to a file does not change its prompts; starting again imports them.
    file = with_quality(write_run(tmp_path, strategy="oracle", name="next", prompts=80), 'kind = "math"')
    whole = (tmp_path / "prompts.jsonl").read_text()
    without(tmp_path, "answer", every=2)
    assert persyn("run", "start", file).returncode == 3
    assert count() == 30
    (tmp_path / "prompts.jsonl").write_text(whole)
    started(persyn, file)
    assert count() == 0


def test_a_store_that_another_process_holds_is_waited_for_aloud(persyn: Persyn, tmp_path: Path) -> None:
    import sqlite3

    file = write_run(tmp_path)
    assert persyn("db", "upgrade").returncode == 0
    holder = sqlite3.connect(tmp_path / "home/persyn.db", isolation_level=None, check_same_thread=False)
    holder.execute("BEGIN IMMEDIATE")
    release = threading.Timer(8.0, lambda: holder.execute("ROLLBACK"))
    release.start()
    done = persyn("run", "start", str(file))
    release.join()
    holder.close()
    assert done.returncode == 0, done.stderr
    assert "waiting for another process to finish writing to the store" in done.stderr


def test_slow_generation_says_that_it_goes_on(persyn: Persyn, tmp_path: Path) -> None:
    file = write_run(tmp_path, strategy="random", prompts=6, teachers=("ada", "bob"), options={"latency_seconds": 12})
    before, of_bob, after = file.read_text().rpartition("latency_seconds = 12")
    file.write_text(f"{before}{of_bob.replace('12', '0')}{after}")
    done = persyn("run", "start", str(file))
    assert done.returncode == 0, done.stderr
    assert "waiting for results of ada, 10 s so far" in done.stderr
