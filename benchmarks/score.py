"""Compare the scoring speed of learnability (tokens per second) with lm-evaluation-harness and a bare forward pass.

python -m benchmarks.score [--model FOLDER] [--rows 128] [--rounds 2] [--gpus 0]

All three receive the same token ids, of mixed lengths. The harness is needed only here: pip install lm-eval. The bare
pass sorts rows by length, pads them to the longest of each batch, and discards the logits. On the CPU all compute in
float32, on a GPU in bfloat16 with larger batches.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from typing import Any

import torch

from demo import models
from persyn.llm import options, scoring
from persyn.llm.chat import Chat, load_tokenizer
from persyn.llm.protocols import Judge, Judged, ModelSpec
from persyn.llm.scorers import log_likelihood
from persyn.llm.scorers.padding import TokenRow, right_pad
from persyn.llm.template import Conversation

#: Response lengths in words, uniform on a logarithmic scale.
_SHORTEST, _LONGEST = 8, 384
_BATCH, _BATCH_ON_GPU = 8, 32
_WORDS = (
    "the bread was sold before noon and nobody counted how many loaves had been left on a table by the door",
    "where two children waited for their mother who came late with seven eggs a jar of honey and one question",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="default: SmolLM2-135M-Instruct, as in the demo")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--gpus", type=int, choices=(0, 1), default=0)
    options = parser.parse_args()
    dtype = "bfloat16" if options.gpus else "float32"
    spec = ModelSpec(
        "log_likelihood", options.model or str(models.smollm2()), gpus=options.gpus, options={"dtype": dtype}
    )
    requests = _requests(options.rows)
    chat = Chat(load_tokenizer(spec))
    rows = [TokenRow(each.id, *chat.response_ids(Conversation(each.messages, each.response))) for each in requests]
    n_tokens = sum(len(row.ids) for row in rows)

    runs: dict[str, Callable[[], list[float]]] = {"PerSyn": _persyn(spec, requests), "bare": _bare(spec, rows)}
    if (harness := _harness(spec, rows)) is not None:
        runs["lm-eval"] = harness
    rates: dict[str, list[float]] = {name: [] for name in runs}
    values: dict[str, list[float]] = {}
    if options.gpus:
        _warm(runs)
    for _ in range(options.rounds):  # alternating, so that noise affects all of them
        for name, run in runs.items():
            began = time.perf_counter()
            values[name] = run()
            rates[name].append(n_tokens / (time.perf_counter() - began))
    where = torch.cuda.get_device_name() if options.gpus else f"{torch.get_num_threads()} threads"
    print(f"{len(rows)} rows, {n_tokens:,} tokens, {where}, {dtype}")
    for name, found in rates.items():
        print(f"  {name:8} " + ", ".join(f"{rate:,.0f}" for rate in found) + " tokens/s")
    for name in runs.keys() - {"PerSyn"}:
        print(f"PerSyn : {name}: {sum(rates['PerSyn']) / sum(rates[name]):.2f}")
    if "lm-eval" in values:
        apart = max(abs(a - b) for a, b in zip(values["PerSyn"], values["lm-eval"], strict=True))
        print(f"the two log-likelihoods differ by at most {apart:.1e} nats")


def _warm(runs: dict[str, Callable[[], list[float]]]) -> None:
    """Run once before timing: a GPU's first pass compiles kernels and allocates memory."""
    for run in runs.values():
        run()


def _requests(n_rows: int) -> list[Judge]:
    draw = random.Random(0)
    words = " ".join(_WORDS).split()
    requests = []
    for number in range(n_rows):
        n_words = round(_SHORTEST * (_LONGEST / _SHORTEST) ** draw.random())
        question = " ".join(draw.choices(words, k=draw.randint(8, 60)))
        requests.append(
            Judge(number, [{"role": "user", "content": question}], " ".join(draw.choices(words, k=n_words)))
        )
    return requests


def _persyn(spec: ModelSpec, requests: list[Judge]) -> Callable[[], list[float]]:
    engine = log_likelihood.load(spec, lambda: None)

    def run() -> list[float]:
        engine.submit(requests)
        found: dict[int, float] = {}
        while engine.pending:
            for result in engine.step():
                assert isinstance(result, Judged), result
                found[result.id] = result.value
        return [found[request.id] for request in requests]

    return run


def _bare(spec: ModelSpec, rows: list[TokenRow]) -> Callable[[], list[float]]:
    from transformers import AutoModelForCausalLM

    model = scoring.load_weights(AutoModelForCausalLM, spec, options.ScorerOptions(**spec.options))
    batch = _BATCH_ON_GPU if spec.gpus else _BATCH
    rows = sorted(rows, key=lambda row: -len(row.ids))

    @torch.inference_mode()
    def run() -> list[float]:
        for start in range(0, len(rows), batch):
            model(input_ids=right_pad(rows[start : start + batch], 0, model.device), use_cache=False)
        if spec.gpus:
            torch.cuda.synchronize()
        return []

    return run


def _harness(spec: ModelSpec, rows: list[TokenRow]) -> Callable[[], list[float]] | None:
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        print("lm-evaluation-harness is not installed: pip install lm-eval")
        return None
    batch, device = (_BATCH_ON_GPU, "cuda:0") if spec.gpus else (_BATCH, "cpu")
    judge: Any = HFLM(pretrained=spec.model, device=device, dtype=spec.options["dtype"], batch_size=batch)
    asked = [(("", str(row.id)), row.ids[: row.start], row.ids[row.start :]) for row in rows]

    def run() -> list[float]:
        return [value for value, _ in judge._loglikelihood_tokens(asked, disable_tqdm=True)]

    return run


if __name__ == "__main__":
    main()
