"""Add kinds of routers and cross-fitted router scores; the router of an existing run is a head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None

Json = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")

_RUNS = sa.table("runs", sa.column("id"), sa.column("config", Json))
#: The keys of [router] that were not there before.
_KEYS = {"kind", "features", "encoders", "embedding", "embedding_revision", "embedding_version"}


def _kind() -> sa.Column[str]:
    comment = "how it predicts: head, neighbours, ..."
    return sa.Column("kind", sa.String(), nullable=False, server_default="head", comment=comment)


def _cross_fitted() -> sa.Column[float]:
    comment = "of a calibration prompt: the score of a router that was fitted without it"
    return sa.Column("cross_fitted", sa.Double(), nullable=True, comment=comment)


def upgrade() -> None:
    op.add_column("routers", _kind())
    op.add_column("router_scores", _cross_fitted())
    _change(lambda config: {**config, "router": {**config.get("router", {}), "kind": "head"}})


def downgrade() -> None:
    _change(_before)
    op.drop_column("router_scores", "cross_fitted")
    op.drop_column("routers", "kind")


def _before(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration without the keys that earlier versions do not know."""
    router = {key: value for key, value in config.get("router", {}).items() if key not in _KEYS}
    strategy = {key: value for key, value in config.get("strategy", {}).items() if key != "when_unsure"}
    run = {key: value for key, value in config.get("run", {}).items() if key != "learnability"}
    return {**config, "router": router, "strategy": strategy, "run": run}


def _change(change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change each run's configuration."""
    connection = op.get_bind()
    for run_id, config in connection.execute(sa.select(_RUNS)).all():
        connection.execute(_RUNS.update().where(_RUNS.c.id == run_id).values(config=change(config)))
