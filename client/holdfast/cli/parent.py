"""Children of `holdfast up` end when it dies, however it dies: a kill -9 of `up` must not leave services behind that
hold the directory's locks.

Linux can send a signal when the parent is gone; the parent is compared afterwards, as it may have gone before. On other
systems children of a killed `up` go on until they are stopped by hand.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import Final

# Set by `up` for its children: its process id.
PARENT_VARIABLE: Final = "HOLDFAST_UP_PID"

_PR_SET_PDEATHSIG: Final = 1


def end_with_parent() -> None:
    """Ask for SIGTERM when the `up` that started this process dies; nothing if none did.

    Raises:
        SystemExit: it is dead already.
    """
    parent = os.environ.pop(PARENT_VARIABLE, "")
    if not parent or sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != int(parent):
        raise SystemExit(1)
