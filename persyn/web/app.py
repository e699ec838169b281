"""Assemble the console's ASGI application and its routes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
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
from persyn.web.count_cache import CountCache
from persyn.web.pages import Problem
from persyn.web.safety import Access, Guard


@dataclass(frozen=True, slots=True)
class Page:
    """A page of the console."""

    path: str
    answer: Callable[[Request], Response | Awaitable[Response]]
    #: In the navigation: of its run if the path has one, else of the console. None: it is reached by links.
    title: str | None = None
    methods: tuple[str, ...] = ("GET",)


PAGES = (
    Page("/", runs.index, "Runs"),
    Page("/enter", runs.redirect_login, methods=("GET", "POST")),
    Page("/runs/{run}", runs.show, "Overview"),
    Page("/runs/{run}/prompts", prompts.index, "Prompts"),
    Page("/runs/{run}/prompts/{prompt}", prompts.show),
    Page("/runs/{run}/figures/{name}.svg", figures.show),
    Page("/runs/{run}/failures", failures.index, "Failures"),
    Page("/runs/{run}/retry", failures.retry, methods=("POST",)),
    Page("/sql", sql.show, "SQL"),
    Page("/sql.csv", sql.download),
)


def make(database: Database, access: Access, cache: CountCache) -> ASGIApp:
    """Build the guarded application for one store.

    cache: the cache of the store's counts.
    """
    pages.set_navigation({page.path: page.title for page in PAGES if page.title})
    app = Starlette(
        routes=[
            *(Route(page.path, page.answer, methods=list(page.methods)) for page in PAGES),
            Mount("/static", StaticFiles(directory=str(files("persyn.web") / "static"))),
        ],
        exception_handlers={
            Problem: pages.explain,
            HTTPException: pages.explain,
            **dict.fromkeys(store.STORE_ERRORS, store.explain_unavailable),
            Exception: pages.explain,
        },
    )
    app.state.database, app.state.access, app.state.cache = database, access, cache
    return Guard(app, access)
