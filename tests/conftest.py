"""What every test has: Hypothesis without a clock, a home of its own, and none of the caller's own settings.

And which tests are slow.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import hypothesis
import pytest

# A deadline an example would measure the machine; how long a test may take is pytest-timeout's business.
hypothesis.settings.register_profile("holdfast", deadline=None, print_blob=True)
hypothesis.settings.load_profile("holdfast")

# Clusters that tests start keep their tokens here and not in the home of who runs the tests; one for the whole process,
# since clusters live longer than a test.
_HOME = tempfile.mkdtemp(prefix="holdfast-home-")
os.environ["HOLDFAST_HOME"] = _HOME
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Count all that starts whole clusters of processes as slow."""
    end_to_end = Path(__file__).parent / "e2e"
    for item in items:
        if item.path.is_relative_to(end_to_end):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOLDFAST_HOME", _HOME)
    ours = [each for each in os.environ if each.startswith("HOLDFAST_") and not each.startswith("HOLDFAST_TEST_")]
    for name in set(ours) - {"HOLDFAST_HOME"}:
        monkeypatch.delenv(name)
