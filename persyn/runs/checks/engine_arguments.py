"""Check a run's `engine_args` against the vLLM that is installed here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from persyn.llm import vllm_arguments
from persyn.llm.protocols import Finding
from persyn.runs.checks.models import UsedModel


def check(loaded: Sequence[UsedModel]) -> Iterator[tuple[str, Finding]]:
    """Yield (whose, finding) for each model with arguments that vLLM rejects, or that cannot be checked here."""
    given = [model for model in loaded if model.spec.options.get("engine_args")]
    fitting = []
    for model in given:
        try:
            vllm_arguments.parallel(model.spec.options["engine_args"], model.spec.gpus)
            fitting.append(model)
        except ValueError as error:
            yield model.whose, Finding("error", "engine_args", str(error))
    if fitting and not vllm_arguments.is_installed():
        message = "vllm is not installed here, so engine_args are only checked by the worker that loads the model"
        yield from ((model.whose, Finding("warning", "engine_args", message)) for model in fitting)
    elif fitting:
        flaws = vllm_arguments.check([model.spec.options["engine_args"] for model in fitting])
        for model, flaw in zip(fitting, flaws, strict=True):
            if flaw:
                yield model.whose, Finding("error", "engine_args", flaw)
