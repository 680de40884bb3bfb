"""What a service has loaded by the time it serves, left out of the interpreter's searches for garbage.

For processes of our own only: what a program around the SDK has made is that program's to search.
"""

from __future__ import annotations

import gc


def leave_out_what_is_loaded() -> None:
    """Have later searches pass over everything that exists now.

    A service has two hundred thousand objects when it begins to serve, and keeps them. A full search goes through them
    all and holds every call up for 30 ms; the first large save after a start always meets one.
    """
    gc.freeze()
