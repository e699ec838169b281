"""Check the chat templates of a run's models before any model is loaded; see `persyn.llm.template_check`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from persyn.config import RunConfig
from persyn.errors import PersynError
from persyn.llm.engines import ENGINES
from persyn.llm.identity import identify
from persyn.llm.protocols import Finding, ModelSpec
from persyn.runs.checks import models


def check(config: RunConfig) -> Iterator[tuple[str, Finding]]:
    """Yield (whose, finding) for each problem with a chat template, and for what the user should know about it."""
    found: dict[tuple[str, str | None, bool], list[Finding]] = {}
    for model in models.loaded(config):
        spec = model.spec
        # A router falls back to plain text where the template fails; a server renders a template of its own.
        if spec.engine == "router_fit" or ENGINES[spec.engine].starts_server:
            continue
        answers = spec.engine != "reward_model"
        key = (spec.model, spec.revision, answers)
        if key not in found:  # loading a tokenizer takes seconds
            found[key] = _check(spec, answers=answers)
        yield from ((model.whose, finding) for finding in found[key])


def _check(spec: ModelSpec, *, answers: bool) -> list[Finding]:
    from persyn.llm import template_check
    from persyn.llm.chat import Chat, load_tokenizer

    try:
        if not Path(spec.model).is_dir():
            identify(spec.model, spec.revision)  # asks an unreachable hub once; a tokenizer would ask for each file
        chat = Chat(load_tokenizer(spec))
    except PersynError:
        return []  # a model without a tokenizer cannot be loaded, and loading reports why
    if chat.template is None:
        return []  # a base model, as most students are
    found = template_check.look_over(chat, answers=answers)
    return [finding for finding in found if finding.level != "ok"]
