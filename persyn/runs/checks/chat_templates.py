"""Check the chat templates of a run's models before any model is loaded; see `persyn.llm.template_check`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from persyn.config import RunConfig, fingerprint_of
from persyn.errors import PersynError
from persyn.llm.engines import ENGINES
from persyn.llm.identity import identify
from persyn.llm.protocols import Finding, ModelSpec
from persyn.runs.checks import models, prompts
from persyn.runs.checks.models import UsedModel


def check(config: RunConfig) -> Iterator[tuple[str, Finding]]:
    """Yield (whose, finding) for each problem with a chat template, and for what the user should know about it."""
    found: dict[str, list[Finding]] = {}
    has_tools = prompts.have_tools(config)
    for model in models.loaded(config):
        spec = model.spec
        # A router falls back to plain text where the template fails; a server renders a template of its own.
        if spec.engine == "router_fit" or ENGINES[spec.engine].starts_server:
            continue
        answers = spec.engine != "reward_model"
        calls = _reads_calls(model) if has_tools and model.whose != "the judge" else None
        key = fingerprint_of([spec.model, spec.revision, answers, calls, _variables(spec)])
        if key not in found:  # loading a tokenizer takes seconds
            found[key] = _check(spec, answers=answers, calls=calls)
        yield from ((model.whose, finding) for finding in found[key])


def _reads_calls(model: UsedModel) -> bool:
    """Whether a model's calls are read in the form that its template writes: a teacher's without a named parser."""
    return model.table == "teachers" and model.spec.options.get("tool_parser") is None


def _check(spec: ModelSpec, *, answers: bool, calls: bool | None) -> list[Finding]:
    from persyn.llm import template_check
    from persyn.llm.chat import Chat, load_tokenizer

    try:
        if not Path(spec.model).is_dir():
            identify(spec.model, spec.revision)  # asks an unreachable hub once; a tokenizer would ask for each file
        chat = Chat(load_tokenizer(spec), variables=_variables(spec))
    except PersynError:
        return []  # a model without a tokenizer cannot be loaded, and loading reports why
    if chat.template is None:
        return []  # a base model, as most students are
    found = template_check.look_over(chat, answers=answers)
    if calls is not None:
        found += template_check.look_over_tools(chat.template, calls=calls)
    return [finding for finding in found if finding.level != "ok"]


def _variables(spec: ModelSpec) -> dict[str, Any]:
    found: dict[str, Any] = spec.options.get("chat_template_kwargs", {})
    return found
