"""`persyn init`: something to begin with."""

from __future__ import annotations

from pathlib import Path

import click

from persyn.errors import UsageError

_RUN = """\
# A run: which prompts, which teachers, for which student. Start it with: persyn run start run.toml
# A key that PerSyn does not know is an error, so a typing mistake cannot pass for a default.

[run]
name = "first"
setting = "math"            # quality is the correctness of the final answer; or "instruct": a reward model's score
alpha = 0.4                 # weight of learnability; the rest is quality's
normalise = "minmax"        # how scores are compared within a prompt: minmax | zscore | rank
calibration = 8             # prompts answered by all teachers; 2500 is a good number for a real run
holdout = 0.25              # share of them kept to measure the router
seed = 0

[prompts]
file = "prompts.jsonl"      # JSONL, JSON, CSV or Parquet; fields: prompt | messages, answer, id, and anything else

[student]
name = "smollm2-135m"
model = "HuggingFaceTB/SmolLM2-135M-Instruct"   # a hub id, or a folder

[quality]
kind = "math"               # or "reward_model" with model = "Skywork/Skywork-Reward-V2-Qwen3-0.6B"

[router]
backbone = "HuggingFaceTB/SmolLM2-135M-Instruct"
tune = "head"               # head: seconds, little data | lora | full: the paper's

[[teachers]]
name = "smollm2-360m"
model = "HuggingFaceTB/SmolLM2-360M-Instruct"
family = "smollm2"
engine = "transformers"     # vllm: fast, on GPUs | transformers: anywhere | openai: any compatible server
gpus = 0
sampling = { temperature = 0.7, max_tokens = 512 }

[[teachers]]
name = "qwen2.5-0.5b"
model = "Qwen/Qwen2.5-0.5B-Instruct"
family = "qwen"
engine = "transformers"
gpus = 0
sampling = { temperature = 0.7, max_tokens = 512 }

# A teacher behind a server:
# [[teachers]]
# name = "big"
# model = "the-name-the-server-knows"
# engine = "openai"
# gpus = 0
# options = { base_url = "http://127.0.0.1:8000/v1", api_key_env = "MY_KEY", concurrency = 64 }
"""

_PROMPTS = "\n".join(
    f'{{"id": "{a}x{b}", "prompt": "What is {a} times {b}? Give only the number.", "answer": "{a * b}"}}'
    for a in range(3, 9)
    for b in range(6, 10)
)


@click.command()
@click.argument("folder", default=".", type=click.Path(path_type=Path, file_okay=False))
def init(folder: Path) -> None:
    """Write run.toml and prompts.jsonl into FOLDER; a file that is there stays."""
    files = {"run.toml": _RUN, "prompts.jsonl": _PROMPTS + "\n"}
    if there := [name for name in files if (folder / name).exists()]:
        raise UsageError(f"{folder / there[0]} exists already; give another folder, or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(content)
        click.echo(f"wrote {folder / name}")
    click.echo(f"next: persyn run start {folder / 'run.toml'}")
