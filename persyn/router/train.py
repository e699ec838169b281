"""Train a router on a calibration grid: its head alone, or the whole of it, or low-rank adapters.

Every training begins with the head fitted to the frozen backbone, so that fine-tuning starts at
what is already a router and bends the backbone no further than that needs.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from persyn.errors import HostLacks
from persyn.llm.protocols import Tick
from persyn.method import routing_metrics
from persyn.method.rewards import Matrix
from persyn.router import head
from persyn.router.model import Router, pad, pair_loss, preference_weights

TUNES = ("full", "lora", "head")

#: Share of the calibration prompts that fine-tuning does not learn from: they decide when it stops. Where that is few,
#: so many, up to a larger share.
VALIDATION, VALIDATION_PROMPTS, VALIDATION_AT_MOST = 0.1, 25, 0.2
#: How often they are asked in the course of a training, and how many times without a gain end it.
CHECKS, PATIENCE = 10, 5


@dataclass(frozen=True, slots=True)
class Examples:
    """P prompts as token ids and their (P, K) rewards, NaN where missing."""

    prompts: Sequence[Sequence[int]]
    rewards: Matrix

    def take(self, indices: Sequence[int]) -> Examples:
        """The examples at these places."""
        return Examples([self.prompts[i] for i in indices], self.rewards[list(indices)])


@dataclass(frozen=True, slots=True)
class Plan:
    """How to train; the last four are for fine-tuning."""

    tune: str
    #: How they count: "weighted" or "equal".
    preferences: str
    seed: int
    #: The most tokens, padding included, in a forward pass without gradient.
    batch_tokens: int
    epochs: int
    learning_rate: float
    #: Prompts per step.
    batch_size: int
    lora_rank: int


def train(router: Router, examples: Examples, features: Tensor, plan: Plan, tick: Tick) -> dict[str, Any]:
    """Train `router` in place on P examples that have a preference each; `tick` is called throughout.

    features: (P, H), what the router's backbone makes of them before it is trained.
    returns: what is worth knowing of the training. `head_penalty` is None where cross-validation
             found that the static ranking does better than any head that reads the prompt.
    """
    fine_tune = plan.tune != "head"
    everything = list(range(len(examples.prompts)))
    learn, validate = split(len(everything), plan.seed) if fine_tune else (everything, everything)
    rewards = examples.rewards[learn]
    fitted = head.fit(features[learn], rewards, preferences=plan.preferences, seed=plan.seed, tick=tick)
    with torch.no_grad():
        router.head.weight.copy_(fitted.weight)
        router.head.bias.copy_(fitted.bias)
    notes: dict[str, Any] = {"head_penalty": fitted.penalty if math.isfinite(fitted.penalty) else None}
    if fine_tune:
        notes |= _fine_tune(router, examples.take(learn), examples.take(validate), plan, tick)
    router.requires_grad_(False).eval()
    return notes


def split(n: int, seed: int) -> tuple[list[int], list[int]]:
    """Which of n examples are learned from, and which decide when to stop; drawn by `seed`."""
    order = np.random.default_rng(seed).permutation(n).tolist()
    n_validation = max(1, round(VALIDATION * n), min(VALIDATION_PROMPTS, round(VALIDATION_AT_MOST * n)))
    # A single example has to do for both.
    return order[n_validation:] or order, order[:n_validation]


class KeepBest(TrainerCallback):
    """Keep the weights that do best on the validation prompts, stop when nothing is gained any more.

    The best have the highest hit rate, and among equals the lowest loss. The weights that training
    starts from take part: they are kept when it makes nothing better.
    """

    def __init__(self, router: Router, tick: Tick) -> None:
        self._trained = {name: p for name, p in router.named_parameters() if p.requires_grad}
        self._tick = tick
        self._kept: dict[str, Tensor] = {}
        self._best = (-math.inf, -math.inf)
        self._misses = 0
        self.best_step = 0

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Report life after a training step."""
        self._tick()

    def on_prediction_step(self, *_: Any, **__: Any) -> None:
        """Report life after a batch of validation prompts."""
        self._tick()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **found: Any) -> None:
        """Keep the weights if they are the best so far."""
        metrics = found["metrics"]
        measured = (metrics["eval_hit"], -metrics["eval_loss"])
        # Where scores are no numbers any more, their hit rate is chance.
        if not self._kept or (math.isfinite(metrics["eval_loss"]) and measured > self._best):
            self._best, self._misses, self.best_step = measured, 0, state.global_step
            self._kept = {name: p.detach().cpu().clone() for name, p in self._trained.items()}
        else:
            self._misses += 1
        if self._misses >= PATIENCE:
            control.should_training_stop = True

    def restore(self) -> None:
        """Put the best weights back into the router."""
        with torch.no_grad():
            for name, parameter in self._trained.items():
                parameter.copy_(self._kept[name])


class _PairTrainer(Trainer):
    """Trains on preferences: each prompt is encoded once per step, the loss is over all its pairs."""

    preferences = "weighted"

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        scores = model(inputs["input_ids"], inputs["lengths"])
        loss = pair_loss(scores, preference_weights(inputs["rewards"], self.preferences))
        return (loss, {"scores": scores}) if return_outputs else loss


def _fine_tune(router: Router, learn: Examples, validate: Examples, plan: Plan, tick: Tick) -> dict[str, Any]:
    _choose_weights(router, plan)
    device = router.head.weight.device
    keep = KeepBest(router, tick)
    steps = max(1, math.ceil(len(learn.prompts) / plan.batch_size) * plan.epochs)
    with tempfile.TemporaryDirectory(prefix="persyn-router-") as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            num_train_epochs=plan.epochs,
            learning_rate=plan.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            per_device_train_batch_size=plan.batch_size,
            per_device_eval_batch_size=plan.batch_size,
            train_sampling_strategy="group_by_length",
            eval_strategy="steps",
            eval_steps=max(1, steps // CHECKS),
            eval_on_start=True,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=plan.seed,
            bf16=device.type == "cuda",
            use_cpu=device.type == "cpu",
            dataloader_pin_memory=device.type == "cuda",
            remove_unused_columns=False,
            label_names=["rewards"],
        )
        # One device, where the host shows several: the trainer would take them all, and as many batches per step.
        arguments._n_gpu = 1
        trainer = _PairTrainer(
            router,
            arguments,
            data_collator=_collate,
            train_dataset=_rows(learn),
            eval_dataset=_rows(validate),
            compute_metrics=_hit_rate,
            callbacks=[keep],
        )
        trainer.preferences = plan.preferences
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    keep.restore()
    return {"steps": trainer.state.global_step, "best_step": keep.best_step, "n_validation": len(validate.prompts)}


def _choose_weights(router: Router, plan: Plan) -> None:
    """Make the weights that are to be trained trainable: all, or new low-rank adapters; the head always."""
    if plan.tune == "lora":
        try:
            from peft import LoraConfig, TaskType, get_peft_model
        except ImportError as error:
            raise HostLacks("tune = 'lora' needs peft: pip install 'persyn[lora]'") from error
        torch.manual_seed(plan.seed)  # the adapters' first values
        config = LoraConfig(
            task_type=TaskType.FEATURE_EXTRACTION,
            r=plan.lora_rank,
            lora_alpha=2 * plan.lora_rank,
            target_modules="all-linear",
        )
        router.backbone = get_peft_model(router.backbone, config)
    else:
        router.backbone.requires_grad_(True)
    router.head.requires_grad_(True)


def _rows(examples: Examples) -> list[dict[str, Any]]:
    pairs = zip(examples.prompts, examples.rewards, strict=True)
    return [{"input_ids": list(ids), "rewards": rewards} for ids, rewards in pairs]


def _collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    input_ids, lengths = pad([row["input_ids"] for row in rows])
    rewards = torch.from_numpy(np.stack([row["rewards"] for row in rows]))
    return {"input_ids": input_ids, "lengths": lengths, "rewards": rewards}


def _hit_rate(prediction: Any) -> dict[str, float]:
    """Hit@3; with three teachers or two, which it could not tell apart, the largest k that can."""
    scores, rewards = prediction.predictions, np.asarray(prediction.label_ids, dtype=np.float64)
    hits = routing_metrics.hit_rate(np.asarray(scores, dtype=np.float64), rewards, k=min(3, rewards.shape[1] - 1))
    return {"hit": hits if hits is not None else 0.0}
