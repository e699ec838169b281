"""Fine-tune a router whose head is fitted: low-rank adapters or all weights, with transformers' Trainer."""

from __future__ import annotations

import math
import tempfile
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from persyn.errors import HostLacks
from persyn.llm.protocols import Tick
from persyn.method import routing_metrics
from persyn.router.model import RouterModel, pad, pair_loss
from persyn.router.train import RouterExamples, TrainingPlan

#: Number of evaluations during a training, and how many without improvement stop it.
CHECKS, PATIENCE = 10, 5


def train(
    router: RouterModel, learn: RouterExamples, validate: RouterExamples, plan: TrainingPlan, tick: Tick
) -> dict[str, Any]:
    """Train the weights that the plan names, and keep those that do best on `validate`; return notes on it."""
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
        # Trainer would use all visible GPUs and multiply the batch size by their number.
        arguments._n_gpu = 1
        trainer = _PairTrainer(
            router,
            arguments,
            data_collator=_collate,
            train_dataset=_rows(learn, plan.preferences),
            eval_dataset=_rows(validate, plan.preferences),
            compute_metrics=_hit_rate,
            callbacks=[keep],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    keep.restore()
    return {"steps": trainer.state.global_step, "best_step": keep.best_step, "n_validation": len(validate.prompts)}


class KeepBest(TrainerCallback):
    """Keep the weights that do best on the validation prompts, and stop when they no longer improve.

    Best means the highest hit rate, then the lowest loss. The initial weights compete too: they are
    kept if training does not improve on them.
    """

    def __init__(self, router: RouterModel, tick: Tick) -> None:
        self._trained = {name: p for name, p in router.named_parameters() if p.requires_grad}
        self._tick = tick
        self._kept: dict[str, Tensor] = {}
        self._best = (-math.inf, -math.inf)
        self._misses = 0
        self.best_step = 0

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Report progress after a training step."""
        self._tick()

    def on_prediction_step(self, *_: Any, **__: Any) -> None:
        """Report progress after a batch of validation prompts."""
        self._tick()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **found: Any) -> None:
        """Keep the weights if they are the best so far."""
        metrics = found["metrics"]
        measured = (metrics["eval_hit"], -metrics["eval_loss"])
        # With NaN scores the hit rate is meaningless, so the loss must be finite.
        if not self._kept or (math.isfinite(metrics["eval_loss"]) and measured > self._best):
            self._best, self._misses, self.best_step = measured, 0, state.global_step
            self._kept = {name: p.detach().cpu().clone() for name, p in self._trained.items()}
        else:
            self._misses += 1
        if self._misses >= PATIENCE:
            control.should_training_stop = True

    def restore(self) -> None:
        """Restore the best weights into the router."""
        with torch.no_grad():
            for name, parameter in self._trained.items():
                parameter.copy_(self._kept[name])


class _PairTrainer(Trainer):
    """Trains on preferences: encodes each prompt once per step; the loss covers all its pairs."""

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        scores = model(inputs["input_ids"], inputs["lengths"])
        loss = pair_loss(scores, inputs["weights"])
        return (loss, {"scores": scores}) if return_outputs else loss


def _choose_weights(router: RouterModel, plan: TrainingPlan) -> None:
    """Make the weights to be trained trainable: all, or new low-rank adapters; always the head."""
    if plan.tune == "lora":
        try:
            from peft import LoraConfig, TaskType, get_peft_model
        except ImportError as error:
            raise HostLacks("tune = 'lora' needs peft: pip install 'persyn[lora]'") from error
        torch.manual_seed(plan.seed)  # initialises the adapters
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


def _rows(examples: RouterExamples, preferences: str) -> list[dict[str, Any]]:
    rows = zip(examples.prompts, examples.rewards, examples.weights(preferences), strict=True)
    return [{"input_ids": list(ids), "rewards": rewards, "weights": weights} for ids, rewards, weights in rows]


def _collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    input_ids, lengths = pad([row["input_ids"] for row in rows])
    rewards, weights = (torch.from_numpy(np.stack([row[name] for row in rows])) for name in ("rewards", "weights"))
    return {"input_ids": input_ids, "lengths": lengths, "rewards": rewards, "weights": weights}


def _hit_rate(prediction: Any) -> dict[str, float]:
    """Hit@3; with two or three teachers, where it would always be 1, the largest informative k."""
    scores, rewards = prediction.predictions, np.asarray(prediction.label_ids, dtype=np.float64)
    hits = routing_metrics.hit_rate(np.asarray(scores, dtype=np.float64), rewards, k=min(3, rewards.shape[1] - 1))
    return {"hit": hits if hits is not None else 0.0}
