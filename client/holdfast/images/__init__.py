"""Volumes of recovery points, readable anywhere at once: nothing is restored, blocks come as they are asked for.

Most processes open none, so `PointImage` is in a module that loads when one is opened.
"""

from typing import Final

from holdfast_core.model.limits import MIB

CACHE_BYTES_DEFAULT: Final = 64 * MIB
READ_AHEAD_BYTES_DEFAULT: Final = 4 * MIB
