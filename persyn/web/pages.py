"""Render pages from templates; everything from the store is untrusted and escaped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any
from urllib.parse import quote, urlencode

import jinja2
from markupsafe import Markup
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from persyn.analysis import summary
from persyn.analysis.trace import beginning
from persyn.jobs import owner

_MOST_IN_A_CELL = 1000
#: Characters of a response's reasoning that a page shows, where a teacher may write hundreds of thousands.
_MOST_REASONING = 20_000
#: The signs for an unknown value and for minus.
_NOTHING, _MINUS = "\u2013", "\u2212"


class Problem(Exception):
    """A request that cannot be served, with a message for the user."""

    def __init__(self, status: HTTPStatus, title: str, text: str) -> None:
        super().__init__(title)
        self.status, self.title, self.text = status, title, text

    def response(self, template: str = "problem.html") -> Response:
        """The page that shows the problem."""
        page = _pages.get_template(template).render(title=self.title, text=self.text, status=self.status)
        return HTMLResponse(page, self.status, headers={"retry-after": "5"} if self.status == 503 else None)


def not_found(what: str) -> Problem:
    """The problem of a missing object."""
    return Problem(HTTPStatus.NOT_FOUND, "Not found", what)


def page(request: Request, template: str, **context: Any) -> HTMLResponse:
    """Render a page of the console; the context holds the template's variables."""
    return HTMLResponse(
        _pages.get_template(template).render(request=request, access=request.app.state.access, **context)
    )


def explain(request: Request, error: Exception) -> Response:
    """The page for an error raised by Starlette or the console."""
    if isinstance(error, Problem):
        return error.response()
    if isinstance(error, HTTPException):
        if error.status_code == HTTPStatus.NOT_FOUND:
            return not_found("There is no such page.").response()
        return Problem(HTTPStatus(error.status_code), HTTPStatus(error.status_code).phrase, error.detail).response()
    return Problem(HTTPStatus.INTERNAL_SERVER_ERROR, "Something went wrong", "See the console's log.").response()


def link(*parts: str | int, **query: Any) -> str:
    """A path on this console; empty query values are left out."""
    path = "/" + "/".join(quote(str(part), safe="") for part in parts)
    given = {name: value for name, value in query.items() if value not in (None, "")}
    return f"{path}?{urlencode(given)}" if given else path


def number(value: float | int | None, digits: int = 4) -> str:
    """Format a number as 1,234,567 or 0.4792; a dash if it is unknown."""
    if value is None or value != value:
        return _NOTHING
    said = f"{value:.{digits}g}"
    if isinstance(value, int) or abs(value) >= 10**digits or "e+" in said:  # rounding 9999.9 gives 1e+04
        said = f"{value:,.0f}"
    return said.replace("-", _MINUS)


def plural(value: int, what: str) -> str:
    """Format a count with its noun: 1 row, 2,000 rows."""
    return f"{value:,} {what}" if value == 1 else f"{value:,} {what}s"


def fixed(value: float | None, digits: int = 3) -> str:
    """Format with a fixed number of decimals, to align a column."""
    return _NOTHING if value is None or value != value else f"{value:,.{digits}f}".replace("-", _MINUS)


def dollars(value: float | None) -> str:
    """Format an amount of US dollars; a dash if it is unknown."""
    return _NOTHING if value is None else summary.dollars(value)


def share(value: float | None) -> str:
    """Format a share as a percentage."""
    return _NOTHING if value is None else f"{value:.0%}".replace("-", _MINUS)


def duration(seconds: float | None) -> str:
    """Format a duration in its two largest units: 1 d 4 h, 3 min 20 s, 2.5 s."""
    if seconds is None:
        return _NOTHING
    if seconds < 10:
        return f"{max(seconds, 0.0):.1f} s"
    left = round(seconds)
    said: list[str] = []
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        if left >= size or said:
            said.append(f"{left // size} {unit}")
            left %= size
    return " ".join(part for part in said[:2] if not part.startswith("0 "))


def moment(at: datetime | None) -> str:
    """Format a time with its zone."""
    if at is None:
        return _NOTHING
    utc = at.astimezone(UTC)
    return Markup('<time datetime="{}">{} UTC</time>').format(utc.isoformat(), f"{utc:%Y-%m-%d %H:%M:%S}")


def cell(value: Any) -> str:
    """Format any value of the store for a table cell; a long one is shortened and marked so."""
    if isinstance(value, datetime):
        return moment(value)
    if isinstance(value, float):
        return number(value)
    if isinstance(value, bool) or value is None:
        return _NOTHING if value is None else str(value).lower()
    text = json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, dict | list) else str(value)
    return beginning(text, _MOST_IN_A_CELL)


def _environment() -> jinja2.Environment:
    found = jinja2.Environment(
        loader=jinja2.PackageLoader("persyn.web"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters.update(
        number=number,
        fixed=fixed,
        plural=plural,
        share=share,
        dollars=dollars,
        duration=duration,
        moment=moment,
        cell=cell,
        beginning=lambda text: beginning(text, _MOST_REASONING),
        worker=owner.short,
    )
    found.globals.update(link=link)
    for name in found.list_templates(extensions=["html"]):
        found.get_template(name)  # compiled at start, so that the first visitor does not wait
    return found


_pages = _environment()
_RUN = "/runs/{run}"


def set_navigation(titles: Mapping[str, str]) -> None:
    """Set the titles of the pages in the navigation, by path; a path with a run belongs to the run's navigation."""
    of_run = {path for path in titles if path.startswith(_RUN)}
    _pages.globals.update(
        site_tabs=[(path, title) for path, title in titles.items() if path not in of_run],
        run_tabs=[(path.removeprefix(_RUN).strip("/"), title) for path, title in titles.items() if path in of_run],
    )
