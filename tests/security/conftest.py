"""One busy run for the tests that look at what it left."""

from __future__ import annotations

import pytest

from tests.security.rig import Run, make_run


@pytest.fixture(scope="session")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """What a cluster of processes left that was used in every way."""
    return make_run(tmp_path_factory.mktemp("busy"))
