"""What every test has: Hypothesis without a clock, and no setting of the caller's own Holdfast."""

from __future__ import annotations

import os

import hypothesis
import pytest

# A deadline an example would measure the machine; how long a test may take is pytest-timeout's business.
hypothesis.settings.register_profile("holdfast", deadline=None, print_blob=True)
hypothesis.settings.load_profile("holdfast")


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [each for each in os.environ if each.startswith("HOLDFAST_") and not each.startswith("HOLDFAST_TEST_")]:
        monkeypatch.delenv(name)
