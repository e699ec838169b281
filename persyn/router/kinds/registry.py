"""All kinds of routers, simple ones first: of kinds with the same reward, the first is taken."""

from __future__ import annotations

from functools import partial

from persyn.registry import Registry
from persyn.router.kinds import clusters, head, linear, neighbours, stacked, static
from persyn.router.kinds.base import RouterKind

_STATIC = RouterKind(
    name="static",
    summary="the teacher with the best mean reward, for every prompt",
    fit=static.fit,
    restore=static.restore,
    # The best of several routers is often one standard error ahead by chance, and to take it then costs reward.
    preferred_within=1.5,
    style=("orange", "s", "--"),
)
_CLUSTERS = RouterKind(
    name="clusters",
    summary="the best teacher of the prompt's label, or of its cluster where prompts have no labels",
    fit=clusters.fit,
    restore=clusters.restore,
    reads=frozenset({"states", "fields"}),
    style=("purple", "P", "-"),
)
_NEIGHBOURS = RouterKind(
    name="neighbours",
    summary="the teachers' mean rewards on the most similar calibration prompts",
    fit=neighbours.fit,
    restore=neighbours.restore,
    reads=frozenset({"states", "fields"}),
    style=("green", "v", "-"),
)
_LINEAR = RouterKind(
    name="linear",
    summary="ridge regression of the rewards on states, labels and the words of the prompt",
    fit=linear.fit,
    restore=linear.restore,
    reads=frozenset({"states", "texts", "fields"}),
    style=("red", "^", "-"),
)
_HEAD = RouterKind(
    name="head",
    summary="a linear head on states and labels that learns from preferences",
    fit=head.fit,
    restore=head.restore,
    reuses_settings=True,
    reads=frozenset({"states", "fields"}),
    style=("blue", "o", "-"),
)
#: What a stacked router is made of.
_MEMBERS = (_STATIC, _CLUSTERS, _NEIGHBOURS, _LINEAR, _HEAD)

ROUTERS = Registry(
    RouterKind,
    *_MEMBERS,
    RouterKind(
        name="stacked",
        summary="a weighted mix of the other kinds",
        fit=partial(stacked.fit, _MEMBERS),
        restore=partial(stacked.restore, {kind.name: kind for kind in _MEMBERS}),
        mix=partial(stacked.mix, _MEMBERS),
        # Of kinds that cannot be told apart, the best is partly so by chance; a mix is seldom much worse than any.
        preferred_within=1.0,
        reads=frozenset({"states", "texts", "fields"}),
        style=("black", "D", "-"),
    ),
    groups=("persyn.routers",),
)
