"""The registry of engines by name. Each is imported only in the host process that loads it."""

from __future__ import annotations

from importlib import import_module

from persyn.errors import UsageError
from persyn.llm.protocols import Engine, Load, ModelSpec, Tick

ENGINES = {
    # teachers: answer `Generate`
    "vllm": "persyn.llm.teachers.vllm_engine",
    "transformers": "persyn.llm.teachers.transformers_engine",
    "openai": "persyn.llm.teachers.chat_server",
    # scorers: answer `Judge`
    "log_likelihood": "persyn.llm.scorers.log_likelihood",
    "reward_model": "persyn.llm.scorers.reward_model",
    "judge": "persyn.llm.scorers.judge",
    "math": "persyn.llm.scorers.math_scorer",
    "instructions": "persyn.llm.scorers.instructions",
    "python": "persyn.llm.scorers.own_function",
    # routers: answer `Fit` and `Route`; custom strategies: answer `Route`
    "router_fit": "persyn.router.fit",
    "router": "persyn.router.route",
    "strategy": "persyn.router.strategy",
    # the teacher check: answers `Check`
    "check": "persyn.llm.check",
    # answers every kind of request, without a model
    "fake": "persyn.llm.fake",
}


def load(spec: ModelSpec, tick: Tick) -> Engine:
    """Import the spec's engine and load its model; `EngineError` when that fails."""
    if spec.engine not in ENGINES:
        raise UsageError(f"no engine named {spec.engine!r}; there are {', '.join(ENGINES)}")
    make: Load = import_module(ENGINES[spec.engine]).load
    return make(spec, tick)
