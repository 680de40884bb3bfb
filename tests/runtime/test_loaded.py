"""What a service loaded is passed over by later searches for garbage, and what it makes afterwards is not."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import gc, weakref
from holdfast_core.runtime.loaded import leave_out_what_is_loaded

class Ring:
    pass

def made():
    ring = Ring()
    ring.itself = ring
    return weakref.ref(ring)

loaded = len(gc.get_objects())
leave_out_what_is_loaded()
frozen, left = gc.get_freeze_count(), len(gc.get_objects())
ring = made()
gc.collect()
print(frozen >= loaded, left < loaded / 10, ring() is None)
"""


def test_later_searches_pass_over_what_was_loaded() -> None:
    said = subprocess.run([sys.executable, "-c", SCRIPT], check=True, timeout=60, capture_output=True, text=True).stdout
    assert said.split() == ["True", "True", "True"]
