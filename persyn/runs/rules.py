"""What the values of a configuration need of one another."""

from __future__ import annotations

from pathlib import Path

from persyn.config import IMPORTED, LIMITS, QualityPart, RouterTable, RunConfig
from persyn.errors import UsageError
from persyn.llm import engines, quality
from persyn.llm.engines import ENGINES
from persyn.method.learnability import LEARNABILITIES
from persyn.method.strategies import STRATEGIES
from persyn.router import inputs
from persyn.runs import fallbacks, prices, validation
from persyn.stages.registry import STAGES


def require(path: Path, config: RunConfig) -> None:
    """Raise `UsageError`, which names the file, for the first value that another one rules out.

    Call it when each engine's options are known to be valid, and `require_quality` before that.
    """
    _require_strategy(path, config)
    _require_router(path, config.router)
    _require_fitted(path, config)
    _require_learnability(path, config)
    _require_samples(path, config)
    fallbacks.require(path, config)
    _require_budget(path, config)


def require_quality(path: Path, config: RunConfig) -> None:
    """Raise `UsageError` for a scorer without the model that it needs, and for a judge without its engine."""
    for place, scorer in validation.scorers(config):
        table, kind = validation.heading(place), ENGINES[scorer.kind]
        needed = {"function": "model, a module:function", "field": "model, the field that scores were imported from"}
        if not scorer.model and (kind.is_nested or kind.model):
            raise UsageError(f"{path}: {table} a {kind.name} needs {needed.get(kind.model, 'a model')}")
        if kind.is_nested and scorer.options.get("engine") not in (known := engines.with_role("judge")):
            raise UsageError(f"{path}: {table} a {kind.name} needs options.engine, one of {', '.join(known)}")
        if isinstance(scorer, QualityPart) and scorer.gate and not kind.may_be_verdict:
            able = ", ".join(name for name in engines.with_role("quality") if ENGINES[name].may_be_verdict)
            raise UsageError(
                f"{path}: {table} a {kind.name} cannot be a gate, because it does not say which responses are right; "
                f"scorers that do: {able}. Give it a weight"
            )


def _require_strategy(path: Path, config: RunConfig) -> None:
    """Raise `UsageError` for a strategy without the fields that it needs."""
    strategy, kind = config.strategy, STRATEGIES[config.strategy.kind]
    if bool(strategy.model) != (kind.decided_by == "function"):
        raise UsageError(f"{path}: [strategy] python needs model, a module:function; no other strategy has a model")
    _require_limits(path, config)
    for field in kind.needs:
        if without := [teacher.name for teacher in config.teachers if getattr(teacher, field) is None]:
            raise UsageError(f"{path}: strategy {kind.name} needs {field} of {', '.join(without)}")
    families = {teacher.family for teacher in config.teachers}
    family = config.student.family if config.student else None
    if kind.needs_family and (family is None or family not in families):
        raise UsageError(f"{path}: strategy {kind.name} needs a [student] family that a teacher has, got {family}")
    if kind.needs_learnability and config.student is None:
        raise UsageError(f"{path}: strategy {kind.name} needs learnability, also at alpha 0; add [student]")


def _require_limits(path: Path, config: RunConfig) -> None:
    """Raise `UsageError` for limits of another strategy than the router's, and for those of unknown teachers."""
    strategy, names = config.strategy, [teacher.name for teacher in config.teachers]
    given = [key for key in LIMITS if getattr(strategy, key) is not None]
    if given and STRATEGIES[strategy.kind].decided_by != "router":
        raise UsageError(
            f"{path}: `strategy.{given[0]}` is only for strategy persyn, whose expected rewards are known; got "
            f"{strategy.kind}"
        )
    for key in given:
        table = getattr(strategy, key)
        if isinstance(table, dict) and (unknown := sorted(table.keys() - set(names))):
            raise UsageError(
                f"{path}: `strategy.{key}` names {', '.join(unknown)}; the teachers are {', '.join(names)}"
            )


def _require_router(path: Path, router: RouterTable) -> None:
    """Raise `UsageError` for a router that cannot read what it is given."""
    kind, encoders, fields = router.chosen_kind, router.encoders, router.features
    lists: dict[str, list[str]] = {"encoders": [*encoders], "features": fields}
    for key, names in lists.items():
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UsageError(f"{path}: `router.{key}` names {', '.join(map(repr, twice))} more than once")
    if ("embedding" in encoders) != (router.embedding is not None):
        raise UsageError(
            f'{path}: [router] an embedding needs both keys: encoders = ["embedding"], and embedding = a model folder '
            "or hub id"
        )
    if router.tune in ("full", "lora") and (kind, encoders, fields) != ("head", ["backbone"], []):
        raise UsageError(
            f"{path}: `router.tune` is {router.tune!r}, which trains a head that reads the backbone alone; use "
            'kind = "head", encoders = ["backbone"] and no features, or tune = "auto"'
        )
    if not inputs.can_read(kind, encoders, fields):
        known = ", ".join(inputs.readable(kind))
        raise UsageError(
            f"{path}: a router of kind {kind!r} reads nothing of its encoders and features; it can read {known}"
        )


def _require_fitted(path: Path, config: RunConfig) -> None:
    """Raise `UsageError` for a router that was fitted before, beside keys that need a calibration or another router."""
    router, strategy = config.router, config.strategy
    if router.fitted is None:
        return
    alone = RouterTable(fitted=router.fitted, gpus=router.gpus, options=router.options)
    if others := [name for name in router.__struct_fields__ if getattr(router, name) != getattr(alone, name)]:
        raise UsageError(f"{path}: `router.{others[0]}` cannot be set beside `router.fitted`, which says all about it")
    if STRATEGIES[strategy.kind].decided_by != "router" or strategy.is_limited:
        raise UsageError(
            f"{path}: `router.fitted` is for strategy persyn without costs and limits, which need calibration prompts"
        )


def _require_samples(path: Path, config: RunConfig) -> None:
    """Raise `UsageError` for several samples of a greedy teacher, and for a choice that the quality cannot make."""
    greedy = [each.name for each in config.teachers if each.engine != IMPORTED and each.is_greedy]
    for table, samples in (("run", config.run.samples), ("generation", config.generation.samples)):
        if samples > 1 and greedy:
            raise UsageError(
                f"{path}: `{table}.samples` is {samples}, but all samples of {', '.join(greedy)} would be the same, as "
                "its sampling temperature is 0; raise the temperature, or set samples = 1"
            )
    keep = config.generation.keep
    if keep == "correct" and not quality.may_be_verdict(config):
        raise UsageError(
            f"{path}: `generation.keep` is 'correct', but quality {quality.name(config)} does not say what is correct; "
            "use keep = 'best', with good_enough if a threshold is known"
        )
    if config.generation.is_choice and any(scorer.kind == IMPORTED for scorer in config.scorers):
        raise UsageError(
            f"{path}: `generation.keep` is {keep!r}, but an imported quality has no score of new responses; use "
            "another quality, or samples = 1"
        )


def _require_learnability(path: Path, config: RunConfig) -> None:
    """Raise `UsageError` for a learnability that the student's engine, the strategy or `learnability_per` rules out."""
    kind = LEARNABILITIES[config.run.learnability]
    engine = ENGINES[config.student.engine] if config.student else None
    if engine and kind.needs and not engine.computes_statistics:
        raise UsageError(
            f"{path}: `run.learnability` {kind.name} needs statistics of tokens, which the student's engine "
            f"{engine.name} does not compute"
        )
    if kind.name != "log_likelihood" and config.run.learnability_per != "token":
        raise UsageError(f"{path}: `run.learnability_per` is only for learnability log_likelihood, got {kind.name}")
    if config.strategy.kind == "car" and not kind.is_log_likelihood:
        raise UsageError(f"{path}: strategy car needs the student's loss, which learnability {kind.name} is not")


def _require_budget(path: Path, config: RunConfig) -> None:
    """Raise `UsageError` for limits of unknown teachers or stages, and for dollars of a model without a price."""
    budget = config.budget
    if budget is None:
        return
    known = {"teachers": [teacher.name for teacher in config.teachers], "stages": list(STAGES)}
    named = {"teachers": budget.teachers, "stages": budget.stages}
    for key, tables in named.items():
        if unknown := sorted(set(tables) - set(known[key])):
            raise UsageError(f"{path}: [budget.{key}.{unknown[0]}]: the run's {key} are {', '.join(known[key])}")
    has_usd = any(limits.usd is not None for limits in (budget, *budget.teachers.values(), *budget.stages.values()))
    if has_usd and (lacking := prices.unpriced(config)):
        raise UsageError(
            f"{path}: [budget] usd needs price_in and price_out of {', '.join(lacking)}, in US dollars per million "
            "tokens; 0 for a server that costs nothing"
        )
