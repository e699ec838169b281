"""The processes that run the tests in parallel know which tests belong together."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(scope="module")
def shared() -> str:
    return "made once"


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="one process runs all tests")
def test_tests_that_share_a_fixture_of_their_module_are_a_group(request: pytest.FixtureRequest, shared: str) -> None:
    # Otherwise each process loads each real model, at the same time.
    assert shared
    assert request.node.nodeid.endswith("@test_processes")
