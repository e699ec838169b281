"""Fine-tune a student (supervised) with the trainer of transformers, resuming from checkpoints after interruptions."""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_pt_utils import LengthGroupedSampler

from persyn.atomic import FolderChanged, replaced
from persyn.errors import EngineError, UsageError
from persyn.llm import options, scoring, template_check
from persyn.llm.chat import Chat, load_tokenizer
from persyn.llm.protocols import ModelSpec
from persyn.llm.template import Conversation
from persyn.student import examples
from persyn.student.examples import StudentExamples
from persyn.student.training_settings import Notes as Notes
from persyn.student.training_settings import TrainingCallback as TrainingCallback
from persyn.student.training_settings import TrainingSettings as TrainingSettings

#: The subfolder of a training that holds the trained weights, and the file in it with the training's notes.
MODEL, NOTES = "model", "training.json"
#: Subfolders that exist only during training.
DATA, CHECKPOINTS = "data", "checkpoints"
#: Approximate number of points on a loss curve.
_POINTS = 100
#: Between two checkpoints.
_SAVE_SECONDS = 600.0


def prepare(spec: ModelSpec, conversations: Iterable[Conversation], settings: TrainingSettings, folder: Path) -> None:
    """Tokenise the training data into `folder`/data with the student's tokenizer.

    spec: the student before training; of its options only `options.FORM_OPTIONS` are read.
    Raises `UsageError` when there is nothing to train on, `EngineError` when the student has no tokenizer or its chat
    template is unusable.
    """
    limit = settings.max_tokens or scoring.max_tokens(scoring.configuration(spec)) or sys.maxsize
    counts = examples.write(folder / DATA, conversations, _chat(spec), max_tokens=limit)
    if not counts.rows:
        raise UsageError(f"nothing to train on: none of {counts.left_out:,} rows fits into {limit:,} tokens")


def train(
    spec: ModelSpec,
    settings: TrainingSettings,
    folder: Path,
    progress: TrainingCallback,
    *,
    save_seconds: float = _SAVE_SECONDS,
) -> Notes:
    """Train a student on prepared data, and write its weights to `folder`/model.

    An interrupted training resumes from its last checkpoint; a finished one is not repeated.
    spec: the student before training; gpus is 0 or 1.
    Raises `EngineError` when the student cannot be loaded, and when the loss becomes NaN or infinite.
    """
    if (folder / MODEL / NOTES).is_file():
        return _finished(folder)
    if spec.gpus > 1:
        raise UsageError(f"a student is trained on one GPU or on the CPU, not on {spec.gpus} GPUs")
    started = time.monotonic()
    rows = StudentExamples(folder / DATA)
    # Weights are kept in float32, with bfloat16 autocast on a GPU: bfloat16 weights would round small updates to zero.
    weights = scoring.load_weights(AutoModelForCausalLM, spec, options.ScorerOptions(dtype="float32"))
    _end_as_taught(weights, _chat(spec))
    model = _tuned(weights, settings)
    state = _fit(model, rows, settings, folder / CHECKPOINTS, progress, save_seconds)
    notes = Notes(
        n_rows=rows.counts.rows,
        n_left_out=rows.counts.left_out,
        response_tokens=rows.counts.response_tokens,
        steps=state.global_step,
        seconds=time.monotonic() - started,
        losses=[(int(entry["step"]), entry["loss"]) for entry in state.log_history if "loss" in entry],
    )
    try:
        _write(model, spec, notes, folder)
    except FolderChanged:  # this process was suspended, and another finished the same training
        return _finished(folder)
    return notes


def _finished(folder: Path) -> Notes:
    _tidy(folder)
    return msgspec.json.decode((folder / MODEL / NOTES).read_bytes(), type=Notes)


class _Watch(TrainerCallback):
    """Reports progress and requests a checkpoint from time to time."""

    def __init__(self, progress: TrainingCallback, save_seconds: float) -> None:
        self._progress = progress
        self._save_seconds = save_seconds
        self._saved_at = time.monotonic()
        self._loss: float | None = None

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        """Store the loss; raise `EngineError` if it is not finite, since training cannot recover from that."""
        self._loss = more.get("logs", {}).get("loss", self._loss)
        if self._loss is not None and not math.isfinite(self._loss):
            raise EngineError(f"at step {state.global_step} the loss is {self._loss}; try a lower learning rate")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Report progress, and request a checkpoint when it is due."""
        self._progress(state.global_step, state.max_steps, self._loss)
        if time.monotonic() - self._saved_at >= self._save_seconds and state.global_step < state.max_steps:
            control.should_save = True

    def on_save(self, *_: Any, **__: Any) -> None:
        """Restart the checkpoint timer."""
        self._saved_at = time.monotonic()


class _ByLength(LengthGroupedSampler):
    """Groups rows of similar length, in an order determined by seed and epoch, so that a resumed epoch is identical."""

    def __init__(self, rows: StudentExamples, settings: TrainingSettings) -> None:
        super().__init__(settings.batch_size, lengths=rows.lengths)
        self._seed = settings.seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before each epoch."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self._seed * 100_003 + self._epoch)
        return iter(super().__iter__())  # type: ignore[no-untyped-call]


class _Trainer(Trainer):
    """A trainer with the sampler above; the built-in one draws from a state that checkpoints do not include."""

    def __init__(self, *arguments: Any, sampler: _ByLength, **more: Any) -> None:
        self._sampler = sampler
        super().__init__(*arguments, **more)

    def _get_train_sampler(self, train_dataset: Any = None) -> _ByLength:
        return self._sampler


def _chat(spec: ModelSpec) -> Chat:
    form = {"add_bos": spec.options.get("add_bos"), "variables": spec.options.get("chat_template_kwargs")}
    return template_check.require(spec, Chat(load_tokenizer(spec), **form))


def _end_as_taught(model: Any, chat: Chat) -> None:
    """Add the token that ends the training responses to the model's end tokens.

    The original sampling defaults are dropped: they were tuned for the model before training, and some cannot be saved.
    """
    old = model.generation_config
    ends = old.eos_token_id if isinstance(old.eos_token_id, list) else [old.eos_token_id]
    model.generation_config = GenerationConfig(
        bos_token_id=old.bos_token_id,
        pad_token_id=old.pad_token_id,
        eos_token_id=sorted({chat.end_id, *ends} - {None}),
    )


def _tuned(model: PreTrainedModel, settings: TrainingSettings) -> Any:
    """The model with the parameters to train set as trainable."""
    model.requires_grad_(True)
    if settings.tune == "full":
        return model
    try:
        from peft import LoraConfig, TaskType, get_peft_model
    except ImportError as error:
        raise EngineError("tune = 'lora' needs peft: pip install 'persyn[lora]'") from error
    torch.manual_seed(settings.seed)  # for the initialisation of the adapters
    rank = settings.lora_rank
    wanted = LoraConfig(task_type=TaskType.CAUSAL_LM, r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    return get_peft_model(model, wanted)


def _fit(
    model: Any,
    rows: StudentExamples,
    settings: TrainingSettings,
    folder: Path,
    progress: TrainingCallback,
    save_seconds: float,
) -> TrainerState:
    micro = settings.micro_batch or settings.batch_size
    steps = math.ceil(len(rows) / settings.batch_size) * settings.epochs
    on_gpu = model.device.type == "cuda"
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate or {"full": 1e-5, "lora": 2e-4}[settings.tune],
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=settings.batch_size // micro,
        gradient_checkpointing=on_gpu,
        save_strategy="no",
        save_total_limit=2,
        logging_steps=max(1, steps // _POINTS),
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        seed=settings.seed,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        remove_unused_columns=False,
    )
    # Use one device even if several are visible: the trainer would use all, with as many batches per step.
    arguments._n_gpu = 1
    trainer = _Trainer(
        model,
        arguments,
        sampler=_ByLength(rows, settings),
        data_collator=examples.collate,
        train_dataset=rows,
        callbacks=[_Watch(progress, save_seconds)],
    )
    trainer.remove_callback(PrinterCallback)
    try:
        trainer.train(resume_from_checkpoint=_last(folder))
    except torch.OutOfMemoryError as error:
        raise EngineError(f"{micro} conversations at a time do not fit in memory; lower micro_batch") from error
    return trainer.state


def _last(folder: Path) -> str | None:
    """The newest complete checkpoint; incomplete ones are deleted (the trainer writes its state file last)."""
    whole: list[tuple[int, Path]] = []
    for path in folder.glob("checkpoint-*"):
        try:
            step = int(msgspec.json.decode((path / "trainer_state.json").read_bytes())["global_step"])
        except (OSError, msgspec.DecodeError, KeyError):
            shutil.rmtree(path)
        else:
            whole.append((step, path))
    return str(max(whole)[1]) if whole else None


def _write(model: Any, spec: ModelSpec, notes: Notes, folder: Path) -> None:
    """Save the trained weights in their original dtype, ready to serve, and delete intermediate files."""
    trained = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    trained.config.use_cache = True  # the trainer turned it off
    stored = getattr(torch, scoring.stored_dtype(scoring.configuration(spec)) or "float32")
    with replaced(folder / MODEL, only_new=True) as new:
        trained.to(stored).save_pretrained(new)
        load_tokenizer(spec).save_pretrained(new)
        (new / NOTES).write_bytes(msgspec.json.format(msgspec.json.encode(notes), indent=2))
    _tidy(folder)


def _tidy(folder: Path) -> None:
    for done in (CHECKPOINTS, DATA):
        shutil.rmtree(folder / done, ignore_errors=True)
