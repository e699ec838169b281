"""Marks for slow tests in which the kind of database plays no part; they run on one of the two."""

from __future__ import annotations

import pytest

SQLITE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
POSTGRESQL = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
