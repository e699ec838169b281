"""Assemble the console's ASGI application and its routes."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from persyn.db.connect import Database
from persyn.web import failures, figures, pages, prompts, runs, sql, store
from persyn.web.kept import Kept
from persyn.web.pages import Problem
from persyn.web.safety import Access, Guard

Page = Callable[[Request], Response]


def make(database: Database, access: Access, kept: Kept) -> ASGIApp:
    """Build the guarded application for one store.

    kept: the cache of the store's counts.
    """
    app = Starlette(
        routes=[
            Route("/", runs.index),
            Route("/enter", runs.enter, methods=["GET", "POST"]),
            Route("/runs/{run}", runs.show),
            Route("/runs/{run}/prompts", prompts.index),
            Route("/runs/{run}/prompts/{prompt}", prompts.show),
            Route("/runs/{run}/figures/{name}.svg", figures.show),
            Route("/runs/{run}/failures", failures.index),
            Route("/runs/{run}/retry", failures.retry, methods=["POST"]),
            Route("/sql", sql.show),
            Route("/sql.csv", sql.download),
            Mount("/static", StaticFiles(directory=str(files("persyn.web") / "static"))),
        ],
        exception_handlers={
            Problem: pages.explain,
            HTTPException: pages.explain,
            **dict.fromkeys(store.AWAY, store.away),
            Exception: pages.explain,
        },
    )
    app.state.database, app.state.access, app.state.kept = database, access, kept
    return Guard(app, access)
