"""All kinds of routers, simple ones first: of kinds that cannot be told apart, the first is taken."""

from __future__ import annotations

from persyn.registry import Registry
from persyn.router.kinds import neighbours, static
from persyn.router.kinds.base import RouterKind

ROUTERS = Registry(
    RouterKind,
    RouterKind(
        name="static",
        summary="the teacher with the best mean reward, for every prompt",
        fit=static.fit,
        restore=static.restore,
        style=("orange", "s", "--"),
    ),
    RouterKind(
        name="neighbours",
        summary="the teachers' mean rewards on the most similar calibration prompts",
        fit=neighbours.fit,
        restore=neighbours.restore,
        reads=frozenset({"states", "fields"}),
        style=("green", "v", "-"),
    ),
    groups=("persyn.routers",),
)
