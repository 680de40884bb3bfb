"""What every test has: Hypothesis without a clock, a home of its own, and none of the caller's own settings.

And which tests are slow.
"""

from __future__ import annotations

import atexit
import collections
import ctypes
import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
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

# The tests start hundreds of Python processes. Compiling Holdfast in each would take a third of their time, so what is
# compiled is kept, for as long as the tests run and beside the tree, whatever the caller says of bytecode.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
if "PYTHONPYCACHEPREFIX" not in os.environ:
    _BYTECODE = os.environ["PYTHONPYCACHEPREFIX"] = tempfile.mkdtemp(prefix="holdfast-bytecode-")
    atexit.register(shutil.rmtree, _BYTECODE, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Count all that starts whole clusters of processes as slow, and let files with slow tests come first.

    Files go to whichever process is free, so a long one that came last would keep one busy while the others are done.
    """
    folder = Path(__file__).parent
    for item in items:
        if any(item.path.is_relative_to(folder / name) for name in ("e2e", "faults")):
            item.add_marker(pytest.mark.slow)
    slow = collections.Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


# To give back costs some 0.1 s, and what was given back is zeroed when it is needed again.
_MUCH_BYTES = 512 << 20


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# Clusters run in threads that come and go by the hundred, and glibc would keep for each what it once needed.
_M_ARENA_MAX = -8
if sys.platform == "linux":
    ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def pytest_collection_finish() -> None:
    """Take what collecting made out of the searches for cycles: it stays, and going over it again and again is dear."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def _memory_goes_back() -> Iterator[None]:
    """Give back after each file what its clusters held, where it is much: glibc keeps what the dead freed."""
    yield
    gc.collect()
    if sys.platform == "linux" and _resident_bytes() > _MUCH_BYTES:
        ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOLDFAST_HOME", _HOME)
    ours = [each for each in os.environ if each.startswith("HOLDFAST_") and not each.startswith("HOLDFAST_TEST_")]
    for name in set(ours) - {"HOLDFAST_HOME"}:
        monkeypatch.delenv(name)
