"""Show the prompts of a run, and the full history of one prompt."""

from __future__ import annotations

from enum import StrEnum
from http import HTTPStatus
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response

from persyn.analysis import listing, watch
from persyn.analysis import trace as history
from persyn.analysis.listing import Cursor, Order, PromptFilter, PromptStatus
from persyn.db.catalog import Prompt, Role
from persyn.errors import UsageError
from persyn.web.pages import Problem, link, not_found, page
from persyn.web.store import counted, find, reading

_PAGE = 50
#: A longer search text would exceed SQLite's limit on patterns.
_MOST_SOUGHT = 1000
#: The fields of a response that are visible at once; the others are folded.
_FIRST = (
    "reward",
    "quality",
    "learnability",
    "tokens",
    "finish_reason",
    "seconds",
    "seed",
    "engine",
    "worker",
    "gpus",
    "job_id",
    "asked_by_run",
)

E = TypeVar("E", bound=StrEnum)


def index(request: Request) -> Response:
    """List a page of the run's prompts that match the filters."""
    filters, after = _filters(request), _after(request)
    with reading(request) as session:
        run = find(session, request)
        teachers = listing.teachers(session, run)
        found = listing.prompts(session, run, filters, after=after, limit=_PAGE)
    counts = counted(request, run.id, tally=watch.count_rows, reasons=listing.reasons, fields=listing.fields)
    reasons, tally, fields = counts["reasons"], counts["tally"], counts["fields"]
    asked = {name: value for name, value in request.query_params.items() if value and name not in ("after", "margin")}
    following = None
    if found.following is not None:
        cursor = {"after": found.following.prompt_id, "margin": found.following.margin}
        following = link("runs", run.name, "prompts", **(asked | cursor))
    return page(
        request,
        "prompts.html",
        run=run,
        filters=filters,
        rows=found.rows,
        following=following,
        is_partial=found.is_partial,
        first=link("runs", run.name, "prompts", **asked) if after else None,
        is_filtered=bool(asked),
        choices={
            "role": list(Role),
            "standing": list(PromptStatus),
            "teacher": teachers,
            "reason": reasons.value if reasons else [],
            "failure": sorted({found.reason for found in tally.value.failures}) if tally else [],
            "field": fields.value if fields else [],
        },
    )


def show(request: Request) -> Response:
    """Show one prompt: scores, margin, responses, jobs and events."""
    given = request.path_params["prompt"]
    if not _is_id(given):
        raise not_found("A prompt's address ends in its id, a number.")
    with reading(request) as session:
        run = find(session, request)
        try:
            found = history.trace(session, run, int(given))
        except UsageError as error:
            raise not_found(f"{str(error)[:1].upper()}{str(error)[1:]}.") from error
        prompt = session.get_one(Prompt, found.prompt_id)
    return page(request, "prompt.html", run=run, prompt=prompt, trace=found, first=_FIRST)


def _filters(request: Request) -> PromptFilter:
    given = request.query_params
    text = given.get("text", "").strip()
    if len(text) > _MOST_SOUGHT:
        raise _bad("text", text, f"of {_MOST_SOUGHT:,} characters at most")
    return PromptFilter(
        text=text,
        role=_choice(request, "role", Role),
        standing=_choice(request, "standing", PromptStatus),
        teacher=given.get("teacher", ""),
        reason=given.get("reason", ""),
        failure=given.get("failure", ""),
        margin_from=_float(request, "margin_from"),
        margin_to=_float(request, "margin_to"),
        quality_from=_float(request, "quality_from"),
        quality_to=_float(request, "quality_to"),
        field=_field(request),
        value=given.get("value", ""),
        order=_choice(request, "order", Order) or Order.ID,
    )


def _after(request: Request) -> Cursor | None:
    given = request.query_params.get("after", "")
    if not given:
        return None
    if not _is_id(given):
        raise _bad("after", given, "a prompt's id")
    return Cursor(int(given), _float(request, "margin"))


def _is_id(given: str) -> bool:
    """Whether a text is a number in the range of database ids."""
    return given.isascii() and given.isdigit() and len(given) <= len(str(2**63)) and int(given) < 2**63


def _choice(request: Request, name: str, kind: type[E]) -> E | None:
    given = request.query_params.get(name, "")
    if not given:
        return None
    try:
        return kind(given)
    except ValueError as error:
        raise _bad(name, given, f"one of {', '.join(kind)}") from error


def _field(request: Request) -> str:
    given = request.query_params.get("field", "").strip()
    if not listing.is_field(given):
        raise _bad("field", given, "the name of a metadata field without quotes and backslashes")
    return given


def _float(request: Request, name: str) -> float | None:
    given = request.query_params.get(name, "").strip()
    if not given:
        return None
    try:
        return float(given)
    except ValueError as error:
        raise _bad(name, given, "a number") from error


def _bad(name: str, given: str, wanted: str) -> Problem:
    return Problem(HTTPStatus.BAD_REQUEST, "Invalid request", f"{name} must be {wanted}, got {given[:100]!r}.")
