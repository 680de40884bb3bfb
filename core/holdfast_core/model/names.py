"""Names that users choose and ids that Holdfast makes, and the checks that keep both harmless.

Ids are `snap-`, `bkp-` or `app-` and 26 characters of lower-case base 32 (RFC 4648 without padding) over 128 random
bits. Names and ids become parts of metadata keys and of paths below a restore directory, so neither may hold a
separator.
"""

from __future__ import annotations

import base64
import re
from typing import Final

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import BLOCK_ID_BYTES, NAME_CHARS_MAX, VOLUME_NAME_CHARS_MAX

SNAPSHOT_PREFIX: Final = "snap-"
BACKUP_PREFIX: Final = "bkp-"
OBJECT_PREFIX: Final = "app-"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+:-]*\Z", re.ASCII)


def check_name(name: str, what: str, *, chars_max: int = NAME_CHARS_MAX) -> str:
    """Return `name` if it may name a VM, task, node or volume; `what` says which, for the message.

    Raises:
        HoldfastError: INVALID_ARGUMENT if it is empty, too long, or has characters other than letters, digits and
            `. _ @ + : -`, the first of them a letter or digit.
    """
    if not name:
        raise HoldfastError(ErrorCode.INVALID_ARGUMENT, f"the {what} is empty; give it a name")
    if len(name) > chars_max:
        raise HoldfastError(
            ErrorCode.INVALID_ARGUMENT, f"the {what} has {len(name)} characters; {chars_max} are allowed"
        )
    if not _NAME.match(name):
        raise HoldfastError(
            ErrorCode.INVALID_ARGUMENT,
            f"the {what} {name!r} is not allowed; use letters, digits and . _ @ + : - and begin with a letter or digit",
        )
    return name


def check_volume_name(name: str) -> str:
    """Return `name` if it may name a volume; as `check_name` with the shorter bound."""
    return check_name(name, "volume name", chars_max=VOLUME_NAME_CHARS_MAX)


def check_id(text: str, what: str) -> str:
    """Return `text` if it could be an id of a point or object.

    It need not have the exact form that Holdfast makes: what is harmless but unknown is simply not found.

    Raises:
        HoldfastError: INVALID_ARGUMENT if it is empty, too long or has path parts.
    """
    return check_name(text, what)


def make_id(prefix: str, random_bytes: bytes) -> str:
    """Make an id from a prefix of this module and 16 random bytes."""
    if len(random_bytes) != 16:
        raise ValueError("an id takes 16 random bytes")
    return prefix + base64.b32encode(random_bytes).decode("ascii").rstrip("=").lower()


def split_ids(packed: bytes) -> list[bytes]:
    """Split packed block ids into a list of 32 bytes each.

    Raises:
        HoldfastError: INVALID_ARGUMENT if the length is not a multiple of 32.
    """
    if len(packed) % BLOCK_ID_BYTES:
        raise HoldfastError(
            ErrorCode.INVALID_ARGUMENT, f"block ids take {BLOCK_ID_BYTES} bytes each; {len(packed)} bytes came"
        )
    return [packed[at : at + BLOCK_ID_BYTES] for at in range(0, len(packed), BLOCK_ID_BYTES)]
