"""The chat templates of a run's models, rendered before a model is loaded; see `persyn.llm.template_check`."""

from __future__ import annotations

from collections.abc import Iterator

from persyn.checks import models
from persyn.config import RunConfig
from persyn.errors import PersynError
from persyn.llm.protocols import Finding, ModelSpec


def look(config: RunConfig) -> Iterator[tuple[str, Finding]]:
    """What is wrong with a chat template, or should be known of it: yields (whose, finding)."""
    for model in models.loaded(config):
        if model.spec.engine != "router_fit":  # a router reads as plain text what its template refuses
            yield from ((model.whose, finding) for finding in _look(model.spec))


def _look(spec: ModelSpec) -> list[Finding]:
    from persyn.llm import template_check
    from persyn.llm.chat import Chat, load_tokenizer

    try:
        chat = Chat(load_tokenizer(spec))
    except PersynError:
        return []  # without a tokenizer it cannot be loaded, and loading says why
    if chat.template is None:
        return []  # a base model, as students mostly are
    found = template_check.look_over(chat, answers=spec.engine != "reward_model")
    return [finding for finding in found if finding.level != "ok"]
