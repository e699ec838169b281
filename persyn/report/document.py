"""Render a report as a self-contained HTML file or as Markdown.

All texts of a run are untrusted. Jinja escapes them in HTML; in Markdown, everything a template prints is escaped
unless marked otherwise; in both, control characters are replaced.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unicodedata import category
from urllib.parse import quote

import msgspec
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from persyn.analysis.summary import dollars
from persyn.analysis.verdict import between
from persyn.atomic import replaced
from persyn.errors import PersynError, UsageError
from persyn.report import drawing, figures
from persyn.report.drawing import Picture
from persyn.report.facts import Report

#: Marks a file as a report within its first bytes, so that no other file is overwritten.
_MARK = b"PerSyn report"
_MARKED_WITHIN = 400
#: Explanations of figures that need one.
_ABOUT = {
    "quality-learnability": "Means over the calibration grid with 95% intervals. Up is better, right is more "
    "learnable for the student.",
    "rewards": "The distribution of each teacher's rewards over the grid; each row has its own scale.",
    "strategies": "Estimated reward of each strategy on the hold-out prompts, with 95% bootstrap intervals over these "
    "prompts.",
    "hit-rates": "How often a teacher with the best reward is among the first k.",
    "router-curve": "Heads fitted to parts of the calibration prompts, drawn several times; the band is one standard "
    "deviation.",
    "reliability": "On the dotted line, predicted win probabilities equal the observed frequencies. Each point is "
    "labelled with its number of preferences; with few, it is mostly chance.",
    "alpha-winners": "Percentage of the calibration grid's prompts whose best response is the teacher's; ties share a "
    "prompt.",
    "alpha-strategies": "Each alpha has its own rewards: compare strategies at one alpha, not one strategy along the "
    "line. 'persyn' is the run's router, which was fitted to the run's own alpha.",
    "savings": "Generate-all is estimated from what each teacher wrote for the calibration grid.",
    "progress": "A job's rows are spread evenly over the time from its first claim to its end.",
}
_MINUS = "\u2212"
#: Holdouts with fewer prompts are reported as small.
_SMALL = 100
#: Line ends, tabs, and the joiners used by scripts and emoji; all spaces are harmless too.
_HARMLESS = frozenset("\r\n\t\u200c\u200d")
#: Characters with a meaning in Markdown, except those without one inside a line.
_MARKDOWN = re.compile(r"([^\w\s,;()%/'-])|_", re.ASCII)
#: The beginning of a line that Markdown reads as a list item.
_LIST = re.compile(r"^(\d*)([-)])")


class _Plain(str):
    """Markdown to print without escaping."""

    __slots__ = ()


def html(report: Report, pictures: Sequence[Picture]) -> str:
    """Render one self-contained page, without scripts or network access."""
    environment = _environment(_shown, autoescape=True)
    drawn = [{"picture": one, "svg": Markup(drawing.svg(one))} for one in pictures]  # noqa: S704 - escaped, see figures
    return environment.get_template("report.html.jinja").render(**_words(report), drawn=drawn)


def markdown(report: Report, pictures: Sequence[Picture], *, folder: str | None = None) -> str:
    """Render CommonMark with tables; figures are described in words, and shown from a folder if there is one.

    folder: where `write_figures` wrote them, relative to the report.
    """
    environment = _environment(_escaped)
    environment.filters["fenced"] = _fenced
    environment.filters["plain"] = _Plain
    place = None if folder is None else _Plain(quote(folder))
    return environment.get_template("report.md.jinja").render(**_words(report), pictures=pictures, folder=place)


def require_replaceable(path: Path) -> None:
    """Raise `UsageError` unless the path is free or holds an earlier report."""
    if not path.parent.is_dir():
        raise UsageError(f"there is no folder {path.parent}; create it, or give another -o")
    if path.is_dir():
        raise UsageError(f"{path} is a folder; give the name of a file, such as {path / 'report.html'}")
    try:
        if path.exists() and not _is_report(path):
            raise UsageError(f"{path} is not a PerSyn report and was not replaced; give another -o")
    except OSError as error:
        raise UsageError(f"cannot read {path}, which would be replaced: {error.strerror}") from error


def _is_report(path: Path) -> bool:
    if not path.is_file():  # reading a pipe would block
        return False
    with path.open("rb") as file:
        return _MARK in file.read(_MARKED_WITHIN)


def write(path: Path, text: str) -> None:
    """Write a report atomically; raises like `require_replaceable`, and `PersynError` when writing fails."""
    require_replaceable(path)
    unfinished = path.with_name(f"{path.name}.new-{uuid.uuid4().hex[:8]}")
    try:
        with unfinished.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        raise PersynError(f"cannot write the report {path}: {error.strerror or error}; nothing was changed") from error
    finally:
        unfinished.unlink(missing_ok=True)


def require_figures_folder(folder: Path) -> None:
    """Raise `UsageError` unless the path is free or holds earlier figures."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UsageError(f"{folder} is a file; give the name of a folder for the figures")
    ours = {f"{name}.{ending}" for name in figures.FIGURES for ending in ("svg", "png")}
    if strangers := {path.name for path in folder.iterdir()} - ours:
        raise UsageError(f"{folder} has {min(strangers)!r}, which is not a figure of a report; give another folder")


def write_figures(folder: Path, pictures: Sequence[Picture]) -> None:
    """Write each figure as NAME.svg and NAME.png; an earlier folder of figures is replaced as a whole."""
    require_figures_folder(folder)
    try:
        with replaced(folder.resolve()) as new:
            for picture in pictures:
                (new / f"{picture.name}.svg").write_text(drawing.svg(picture, ink="paper"), encoding="utf-8")
                (new / f"{picture.name}.png").write_bytes(drawing.png(picture))
    except OSError as error:
        raise PersynError(
            f"cannot write the figures {folder}: {error.strerror or error}; nothing was changed"
        ) from error


def headlines(report: Report) -> list[str]:
    """The most important findings, in sentences."""
    verdict = report.facts.verdict
    said = [*([verdict.says] if verdict else []), *report.recalibrations]
    said += [*report.facts.limits, *report.facts.second_choices]
    said += [each.warning for each in report.facts.realised if each.warning]
    return [*map(_sentence, said), *_routed(report), *_spent(report), *_missed(report)]


def _routed(report: Report) -> list[str]:
    if report.comparison is None:
        return []
    by_name = {fact.strategy: fact for fact in report.comparison.strategies}
    said = []
    if "persyn" in by_name and "static" in by_name:
        router, static, oracle = by_name["persyn"], by_name["static"], by_name["oracle"]
        closed = (
            f"; the router closes {router.gap_closed.mean:.0%} of the gap between them" if router.gap_closed else ""
        )
        said.append(
            f"On {report.comparison.n_holdout:,} hold-out prompts the router's choice has a mean reward of "
            f"{router.reward.mean:.3f} (95%: {router.reward.low:.3f} to {router.reward.high:.3f}). The best single "
            f"teacher has {static.reward.mean:.3f}, the oracle {oracle.reward.mean:.3f}{closed}."
        )
    if report.hits:
        said.append(
            f"Of the {report.hits.n_prompts:,} prompts whose responses differ in reward, it picks a best teacher for "
            f"{report.hits.router[0]:.0%}; the best single teacher is one for {report.hits.static[0]:.0%}, a random "
            f"teacher for {report.hits.random[0]:.0%}."
        )
    if said and report.comparison.n_holdout < _SMALL:
        said.append("That is a small hold-out: these figures are rough.")
    if report.facts.collapsed:
        said.append(
            f"{report.facts.collapsed} received nearly every routed prompt: the router barely distinguishes "
            "between prompts."
        )
    return said


def _spent(report: Report) -> list[str]:
    spent = report.savings
    if spent is None:
        return []
    so_far = "" if spent.is_all else " so far"
    said = (
        f"The teachers generated {spent.tokens:,} tokens{so_far}, about "
        f"{spent.tokens / spent.tokens_generate_all:.0%} of the {spent.tokens_generate_all:,} that all of them would "
        "have generated for all prompts"
    )
    if spent.cost is not None and spent.cost_generate_all:
        said += f": {dollars(spent.cost)} instead of about {dollars(spent.cost_generate_all)}"
    reused = report.facts.reused_tokens
    return [f"{said}.", *([f"A further {reused:,} tokens were reused from the store."] if reused else [])]


def _missed(report: Report) -> list[str]:
    failed = sum(stage.failed for stage in report.facts.stages)
    pending = sum(stage.pending for stage in report.facts.stages)
    rows = "1 row" if failed == 1 else f"{failed:,} rows"
    said = [f"{rows} failed; the reasons are listed below." if failed else "Nothing failed."]
    said += _doubtful(report)
    if report.facts.state != "done":
        said.insert(
            0,
            f"The run is not done: it is {report.facts.state} in stage {report.facts.stage}, with {pending:,} rows "
            "pending. Missing parts are listed below.",
        )
    return said


def _doubtful(report: Report) -> list[str]:
    """Problems of the dataset's responses."""
    said = []
    if cut := [each for each in report.facts.teachers if each.truncated]:
        shares = ", ".join(f"{each.teacher} {each.truncated:.1%}" for each in cut)
        said.append(f"Responses were cut off at max_tokens, by teacher: {shares}.")
    if unfinished := [each for each in report.facts.teachers if each.unfinished]:
        counted = ", ".join(f"{each.teacher} {each.unfinished:,}" for each in unfinished)
        said.append(f"Responses ended inside their reasoning, without an answer, by teacher: {counted}.")
    if report.facts.rejected:
        said.append(f"{report.facts.rejected:,} prompts have no correct response and no row in the dataset.")
    if sampled := [each for each in report.facts.teachers if each.samples is not None]:
        parts = (f"{each.teacher} {each.samples:.1f} ({each.accepted or 0:.0%})" for each in sampled)
        said.append(f"Samples per assigned prompt (and prompts accepted), by teacher: {', '.join(parts)}.")
    if report.facts.wrong:
        said.append(
            f"{report.facts.wrong:,} of the assigned responses are known to be wrong; they are in the dataset unless "
            "it was exported with --drop-wrong."
        )
    return said


def _words(report: Report) -> dict[str, Any]:
    """Variables shared by the HTML and Markdown templates."""
    return {
        "report": report,
        "run": report.config["run"],
        "sources": ", ".join(Path(name).name for name in _names(report.config["prompts"])),
        "facts": report.facts,
        "headlines": headlines(report),
        "about": _ABOUT,
        "config": msgspec.json.format(msgspec.json.encode(report.config), indent=2).decode(),
    }


def _names(prompts: dict[str, Any]) -> list[str]:
    """The names of the files or sources of a run's prompts."""
    given: str | list[str] = prompts["file"] or prompts["source"]
    return [given] if isinstance(given, str) else given


def _environment(finalize: Any, *, autoescape: bool = False) -> Environment:
    environment = Environment(
        loader=PackageLoader("persyn.report"),
        autoescape=autoescape,  # noqa: S701 - Markdown is escaped by `finalize`
        finalize=finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "fixed": lambda value: _formatted(value, "{:,.3f}"),
        "model": lambda value: Path(value).name if value.startswith("/") else value,
        "count": lambda value: _formatted(value, "{:,.0f}"),
        "number": lambda value: _formatted(value, "{:.4g}"),
        "share": lambda value: _formatted(value, "{:.1%}"),
        "sentence": _sentence,
        "between": lambda interval: _Plain(between(interval).replace("-", _MINUS)),
        "signed": lambda value: _formatted(value, "{:+.0%}"),
        "dollars": lambda value: _Plain("-" if value is None else dollars(value)),
        "when": lambda value: _formatted(value, "{:%Y-%m-%d %H:%M} UTC"),
        "span": lambda value: _Plain("-" if value is None else _span(value)),
    }
    return environment


def _sentence(text: str) -> str:
    """With a capital and a full stop."""
    return f"{text[:1].upper()}{text[1:]}."


def _formatted(value: Any, form: str) -> _Plain:
    """Format a number with a proper minus sign; a dash if it is unknown."""
    if value is None:
        return _Plain("-")
    text = form.format(value)
    return _Plain(text.replace("-", _MINUS) if isinstance(value, int | float) else text)


def _span(seconds: float) -> str:
    """A duration in at most two units."""
    for unit, size, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if seconds >= size:
            whole = int(seconds // size)
            return f"{whole} {unit} {int(seconds - whole * size) // part} {smaller}"
    return f"{seconds:.1f} s"


def _shown(value: Any) -> Any:
    """Replace control characters, including those that change the direction of text."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return "".join(c if c.isprintable() or c in _HARMLESS or category(c) == "Zs" else "\ufffd" for c in value)


def _escaped(value: Any) -> Any:
    """Escape a value for Markdown, as a single line of literal text."""
    if not isinstance(value, str) or isinstance(value, _Plain):
        return value
    return _LIST.sub(r"\1\\\2", _MARKDOWN.sub(r"\\\g<0>", " ".join(_shown(value).split())))


def _fenced(text: str) -> _Plain:
    """A code block with a fence that the text cannot close."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return _Plain(f"{fence}text\n{_shown(text)}\n{fence}")
