"""What every test has: Hypothesis without a clock and none of the caller's own settings; and which tests are slow."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest

# A deadline an example would measure the machine; how long a test may take is pytest-timeout's business.
hypothesis.settings.register_profile("holdfast", deadline=None, print_blob=True)
hypothesis.settings.load_profile("holdfast")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Count all that starts whole clusters of processes as slow."""
    end_to_end = Path(__file__).parent / "e2e"
    for item in items:
        if item.path.is_relative_to(end_to_end):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [each for each in os.environ if each.startswith("HOLDFAST_") and not each.startswith("HOLDFAST_TEST_")]:
        monkeypatch.delenv(name)
