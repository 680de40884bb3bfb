"""The protocol's numbers: magics, options, commands, flags, errors, limits."""

from __future__ import annotations

import enum
from typing import Final

DEFAULT_PORT: Final = 10809
NAME_BYTES_MAX: Final = 4096
OPTION_BYTES_MAX: Final = 64 * 1024
REQUEST_BYTES_MAX: Final = 32 * 1024 * 1024
"""The longest read or write that a client may send without having been told of another limit."""

INIT_MAGIC: Final = 0x4E42444D41474943
OPTION_MAGIC: Final = 0x49484156454F5054
OPTION_REPLY_MAGIC: Final = 0x0003E889045565A9
REQUEST_MAGIC: Final = 0x25609513
SIMPLE_REPLY_MAGIC: Final = 0x67446698
CHUNK_MAGIC: Final = 0x668E33EF

CONTEXT_ALLOCATION: Final = "base:allocation"
CONTEXT_BITMAP_PREFIX: Final = "qemu:dirty-bitmap:"
BITMAP_DIRTY: Final = 1
"""The flag of a dirty extent in a context `qemu:dirty-bitmap:NAME`."""


class Handshake(enum.IntFlag):
    """Flags of the greeting, both ways."""

    FIXED_NEWSTYLE = 1
    NO_ZEROES = 2


class Transmission(enum.IntFlag):
    """What an export can do."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_RESIZE = 1 << 9
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11


class Option(enum.IntEnum):
    """What a client asks for while negotiating."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


class Reply(enum.IntEnum):
    """What a server answers to an option; numbers with the highest bit refuse it."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = 1 << 31 | 1
    ERR_POLICY = 1 << 31 | 2
    ERR_INVALID = 1 << 31 | 3
    ERR_PLATFORM = 1 << 31 | 4
    ERR_TLS_REQD = 1 << 31 | 5
    ERR_UNKNOWN = 1 << 31 | 6
    ERR_SHUTDOWN = 1 << 31 | 7
    ERR_BLOCK_SIZE_REQD = 1 << 31 | 8
    ERR_TOO_BIG = 1 << 31 | 9


REPLY_ERROR_BIT: Final = 1 << 31


class Info(enum.IntEnum):
    """Kinds of information about an export."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class Command(enum.IntEnum):
    """Requests of the transmission phase."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class CommandFlag(enum.IntFlag):
    """Flags of a request."""

    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4


class Chunk(enum.IntEnum):
    """Kinds of chunks in a structured reply; numbers with bit 15 are errors."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    ERROR = 1 << 15 | 1
    ERROR_OFFSET = 1 << 15 | 2


CHUNK_DONE: Final = 1
CHUNK_ERROR_BIT: Final = 1 << 15


class Status(enum.IntFlag):
    """Flags of an extent in the context `base:allocation`; 0 is allocated data."""

    HOLE = 1
    ZERO = 2


class Errno(enum.IntEnum):
    """Errors of a reply: the protocol's own numbers, which are Linux's."""

    PERM = 1
    IO = 5
    NOMEM = 12
    INVAL = 22
    NOSPC = 28
    OVERFLOW = 75
    NOTSUP = 95
    SHUTDOWN = 108
