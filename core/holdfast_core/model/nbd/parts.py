"""The pieces that messages are made of: fixed shapes and names, each checked before it is used."""

from __future__ import annotations

import struct
from typing import Final

from holdfast_core.model.nbd.protocol import NAME_BYTES_MAX

U16: Final = struct.Struct(">H")
U32: Final = struct.Struct(">I")


class NbdWireError(Exception):
    """The other side sent what the protocol does not allow; the connection is of no more use."""


def unpack(shape: struct.Struct, data: bytes, what: str) -> tuple[int, ...]:
    """Return the fields of a message that has exactly this shape.

    Raises:
        NbdWireError: the message is another one.
    """
    if len(data) != shape.size:
        raise NbdWireError(f"the {what} has {len(data)} bytes instead of {shape.size}")
    return shape.unpack(data)


def take(shape: struct.Struct, data: bytes, at: int, what: str) -> tuple[int, ...]:
    """Return the fields that stand at a place of a message.

    Raises:
        NbdWireError: the message is another one.
    """
    if len(data) < at + shape.size:
        raise NbdWireError(f"the {what} is too short")
    return shape.unpack_from(data, at)


def packed_text(text: str) -> bytes:
    """Return a name with its length before it."""
    encoded = text.encode()
    return U32.pack(len(encoded)) + encoded


def take_text(data: bytes, at: int, what: str) -> tuple[str, int]:
    """Return a name that stands at a place, and where it ends.

    Raises:
        NbdWireError: the message is another one.
    """
    (length,) = take(U32, data, at, what)
    at += U32.size
    if length > len(data) - at:
        raise NbdWireError(f"a name in the {what} is longer than the rest")
    return decoded(data[at : at + length], what), at + length


def decoded(data: bytes, what: str) -> str:
    """Return a name.

    Raises:
        NbdWireError: the message is another one.
    """
    if len(data) > NAME_BYTES_MAX:
        raise NbdWireError(f"a name in the {what} has more than {NAME_BYTES_MAX} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise NbdWireError(f"a name in the {what} is no UTF-8") from None


def check_magic(found: int, wanted: int, what: str) -> None:
    """Check the number that a message begins with.

    Raises:
        NbdWireError: the message is another one.
    """
    if found != wanted:
        raise NbdWireError(f"the {what} does not begin with its magic number")


def bounded(length: int, limit: int, what: str) -> int:
    """Return a length that is not above its limit.

    Raises:
        NbdWireError: the message is another one.
    """
    if length > limit:
        raise NbdWireError(f"the {what} has {length} bytes of data; {limit} are allowed")
    return length
