"""What a card says of each kind of dataset: what its rows are, how they were made, and how trainers read them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from persyn.config import load_config
from persyn.dataset.manifest import File, Manifest
from persyn.dataset.markdown import code, text
from persyn.dataset.options import TRAIN
from persyn.method.strategies import STRATEGIES

Files: TypeAlias = Mapping[str, Sequence[File]]
"""The files of each format."""


@dataclass(frozen=True, slots=True)
class Use:
    """How one trainer reads a dataset: a title, and a snippet of code or settings; empty where it cannot."""

    title: str
    snippet: Callable[[Manifest, Files], str]


def about_responses(manifest: Manifest) -> str:
    """What the rows of a dataset to fine-tune on are."""
    return (
        f"{manifest.exported:,} conversations to fine-tune {_student(manifest)}, "
        f"each ending with a response that a model wrote. {_routed(manifest)}"
    )


def about_pairs(manifest: Manifest) -> str:
    """What the rows of a dataset of preferences are."""
    options = manifest.export
    which = {
        "best-worst": "A prompt has one pair, of the largest margin.",
        "best-each": "A prompt's best response is paired with each other one.",
        "all": "All pairs of a prompt's responses are rows.",
    }[options.pairs]
    least = f" Margins below {options.min_margin:g} were left out." if options.min_margin else ""
    quality = " The chosen response also has the higher quality." if options.higher_quality else ""
    return (
        f"{manifest.exported:,} pairs of responses to {manifest.used:,} prompts. The chosen response has the higher "
        f"reward; `margin` is the difference, and equal rewards make no pair. {which}{least}{quality} "
        f"{_rewarded(manifest)}"
    )


def about_best(manifest: Manifest) -> str:
    """What the rows of a dataset of best responses are."""
    most = manifest.export.best
    number = f"up to {most}" if most else "all"
    return (
        f"{manifest.exported:,} prompts, each with {number} of the teachers' responses to it in the order of their "
        f"rewards, the best first. {_rewarded(manifest)}"
    )


def about_teachers(manifest: Manifest) -> str:
    """What the rows of a dataset of routed prompts are."""
    return (
        f"{manifest.exported:,} prompts for on-policy distillation of {_student(manifest)}, each with the "
        f"teacher that should rate the student's own responses (`teacher_id`). {_routed(manifest, answered=False)} "
        "`scores` are the router's, or the rewards of the teachers' responses, as `scored_by` says. `probabilities` "
        "are the softmax of the router's scores: the probability that a teacher's response has the highest reward. "
        f"{_held_out(manifest)}"
    )


def _student(manifest: Manifest) -> str:
    return text(manifest.student.name) if manifest.student else "a student"


def _routed(manifest: Manifest, *, answered: bool = True) -> str:
    strategy = load_config(manifest.config).strategy
    kind = STRATEGIES.get(strategy.kind)
    if kind is None or kind.decided_by != "router":
        return f"The teacher of each prompt was chosen by the strategy {text(strategy.name)}."
    best = "the response with the best scores was kept" if answered else "the teacher is that of the best scores"
    if strategy.is_limited:
        by = "teachers' mean rewards on the sample" if manifest.router is None else "router's expectations"
        return (
            f"All teachers answered a calibration sample; for each of its prompts, {best}. All other prompts were "
            f"assigned together, by the {by}, within limits of cost or of prompts for each teacher."
        )
    if manifest.router is None:
        them = "answered all other prompts" if answered else "is that of all other prompts"
        return (
            f"All teachers answered a calibration sample; for each of its prompts, {best}. The sample did not show "
            f"that a router would choose better than the best single teacher, so that teacher {them}."
        )
    is_of_student = load_config(manifest.config).run.alpha > 0
    fitted, for_whom = (" to this student", " for the student") if is_of_student else ("", "")
    return (
        f"A router, fitted{fitted} on a calibration sample, assigned each prompt to the one teacher that it "
        f"expected to be best{for_whom}{', and only that teacher answered it' if answered else ''}. All teachers "
        f"answered the sample itself; for each of its prompts, {best}."
    )


def _rewarded(manifest: Manifest) -> str:
    run, student = load_config(manifest.config).run, _student(manifest)
    if not run.alpha:
        return (
            "All teachers answered a sample of the run's prompts. A response's reward is its quality, normalised over "
            f"the responses to the prompt. {_held_out(manifest)}"
        )
    is_mean = run.learnability == "log_likelihood"
    learnability = f"how likely {student} finds it" if is_mean else f"its {text(run.learnability)} under {student}"
    return (
        "All teachers answered a sample of the run's prompts. A response's reward is 1 - alpha times its quality plus "
        f"alpha times its learnability ({learnability}), each normalised over the responses to the prompt; here, alpha "
        f"is {run.alpha:g}. {_held_out(manifest)}"
    )


def _held_out(manifest: Manifest) -> str:
    """Hold-out prompts are rows, too; a router that is fitted to these rows must not be measured on them."""
    return (
        f"{manifest.holdout:,} rows are of prompts that were held out to measure the run's router (`is_holdout`)."
        if manifest.holdout
        else "No row is of a prompt that was held out to measure the run's router."
    )


def has_reasoning_field(manifest: Manifest, name: str) -> bool:
    """Whether a format of the dataset has reasoning in a field of its own."""
    form = manifest.export.of_kind.formats[name]
    return manifest.reasoning is not None and manifest.export.has_reasoning_field(form)


def entry_name(manifest: Manifest, file: File) -> str:
    """The name of a file's entry in LLaMA-Factory: run, kind unless it is sft, format, and split unless it is train."""
    kind = [] if manifest.export.kind == "sft" else [manifest.export.kind]
    return "_".join([manifest.run, *kind, file.format, *([file.split] if file.split != TRAIN else [])])


def _trl_sft(manifest: Manifest, files: Files) -> str:
    name = next((name for name in ("prompt-completion", "messages") if name in files), None)
    return _trainer("SFTTrainer", name) if name else ""


def _trl_dpo(manifest: Manifest, files: Files) -> str:
    return _trainer("DPOTrainer", "messages") if "messages" in files else ""


def _trainer(name: str, form: str) -> str:
    return code(f'{name}(..., train_dataset=load_dataset(folder, "{form}", split="train"))', "python")


def _llama_factory(manifest: Manifest, files: Files) -> str:
    forms = manifest.export.of_kind.formats
    entries = {name: forms[name].described(has_tools=manifest.tools).llama_factory for name in files}
    readable = (name for name, entry in entries.items() if entry and not has_reasoning_field(manifest, name))
    name = next(readable, None)
    if name is None:
        return ""
    train = File("", name, TRAIN, 0, 0, "")
    lines = ["dataset_dir: .", f"dataset: {entry_name(manifest, train)}"]
    lines += [f"eval_dataset: {entry_name(manifest, file)}" for file in files[name] if file.split != TRAIN][:1]
    is_sft = manifest.export.kind == "sft"
    lines += ["mask_history: true  # train on the last response alone"] if is_sft else ["stage: dpo"]
    return code("\n".join(lines), "yaml")


def _axolotl(manifest: Manifest, files: Files) -> str:
    if "messages" not in files:
        return ""
    entries = {file.split: file.name for file in files["messages"]}
    lines = []
    for key, splits in (("datasets", [TRAIN]), ("test_datasets", [each for each in entries if each != TRAIN][:1])):
        for split in splits:
            if split in entries:
                lines += [f"{key}:", f"  - path: {entries[split]}", "    ds_type: json", "    type: chat_template"]
                lines += ["    field_messages: messages", "    split: train"]
    return code("\n".join(lines), "yaml")


def _trl_distillation(manifest: Manifest, files: Files) -> str:
    if "messages" not in files:
        return ""
    urls = json.dumps({each.name: "http://..." for each in manifest.teachers}, ensure_ascii=False)
    lines = [
        f"args = AsyncDistillationConfig(teacher_server_urls={urls})",
        'AsyncDistillationTrainer(..., args=args, train_dataset=load_dataset(folder, "messages", split="train"))',
    ]
    return code("\n".join(lines), "python")


def _verl(manifest: Manifest, files: Files) -> str:
    if "verl" not in files:
        return ""
    lines = ["data:", f"  train_files: {files['verl'][0].name}", "distillation:", "  enabled: true"]
    lines += ["  teacher_key: teacher_id", "  teacher_models:"]
    for number, teacher in enumerate(manifest.teachers, start=1):
        lines.append(f"    teacher{number}: {{key: {_quoted(teacher.name)}, model_path: ...}}")
    return code("\n".join(lines), "yaml")


def _nemo_rl(manifest: Manifest, files: Files) -> str:
    if "nemo-gym" not in files:
        return ""
    lines = ["on_policy_distillation:", "  enabled: true", "  strict_agent_name_match: true"]
    lines += ["  teacher_model_by_agent_name:"]
    lines += [f"    {_quoted(teacher.name)}: ..." for teacher in manifest.teachers]
    return code("\n".join(lines), "yaml")


def _quoted(value: str) -> str:
    """A text as JSON, which is YAML and Python, too."""
    return json.dumps(value, ensure_ascii=False)


_FACTORY = Use("LLaMA-Factory, whose entries are in `dataset_info.json`:", _llama_factory)
SFT = (
    Use("TRL:", _trl_sft),
    _FACTORY,
    Use("axolotl, which trains on the earlier responses of a conversation too:", _axolotl),
)
PREFERENCE = (Use("TRL, whose `RewardTrainer` takes `margin` as the margin of its loss:", _trl_dpo), _FACTORY)
BEST_OF: tuple[Use, ...] = ()
TEACHERS = (
    Use("TRL (`trl.experimental.async_distillation`), with a server for each teacher:", _trl_distillation),
    Use("verl, with the model of each teacher:", _verl),
    Use("NeMo RL, with a NeMo Gym agent of each teacher's name:", _nemo_rl),
)
