"""Serve the figures of a run's report as images, drawn in the background."""

from __future__ import annotations

import hashlib
import logging
from http import HTTPStatus

from msgspec import Struct
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session
from starlette.requests import Request
from starlette.responses import Response

from persyn.db.catalog import Run
from persyn.web.pages import Problem, not_found
from persyn.web.store import counted, find, reading

log = logging.getLogger(__name__)

#: An image opened by itself may use its own styles and nothing else.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"


class RenderedFigure(Struct, frozen=True):
    """A rendered figure.

    says:    a textual alternative.
    version: changes with the content, so that an open page loads the new image.
    """

    title: str
    says: str
    svg: str
    version: str


def draw(session: Session, run: Run) -> dict[str, RenderedFigure] | str:
    """Draw all figures of a run in its current state, by name; return a message if drawing fails."""
    try:
        return _render(session, run)
    except SQLAlchemyError:
        raise
    except Exception:
        log.exception("the figures of a run cannot be drawn", extra={"run": run.name})
        return "The figures cannot be drawn; see the console's log."


def _render(session: Session, run: Run) -> dict[str, RenderedFigure]:
    # Imported here because matplotlib is needed only for pages that show a run.
    from persyn.report import drawing, figures, gather

    found = {}
    for picture in figures.pictures(gather.gather(session, run)):
        svg = drawing.svg(picture, ink="scheme")
        version = hashlib.sha256(svg.encode()).hexdigest()[:12]
        found[picture.name] = RenderedFigure(picture.title, picture.says, svg, version)
    return found


def show(request: Request) -> Response:
    """Serve one figure as SVG."""
    with reading(request) as session:
        run = find(session, request)
    drawn = counted(request, run.id, figures=draw)["figures"]
    if drawn is None:
        raise Problem(HTTPStatus.SERVICE_UNAVAILABLE, "Still being drawn", "Reload in a moment.")
    figure = None if isinstance(drawn.value, str) else drawn.value.get(request.path_params["name"])
    if figure is None:
        raise not_found("There is no such figure of this run.")
    return Response(figure.svg, media_type="image/svg+xml", headers={"content-security-policy": _POLICY})
