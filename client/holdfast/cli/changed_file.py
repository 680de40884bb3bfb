"""The file of `holdfast backup --changed`: what an orchestrator tracked itself, as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Final

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import MIB

if TYPE_CHECKING:
    from holdfast.sources.told import Changed

FILE_BYTES_MAX: Final = 256 * MIB


def read_changed(path: Path) -> Changed:
    """Read `[[OFFSET, LENGTH], …]`, or an object of such lists by volume name; what they hold the SDK checks.

    Raises:
        HoldfastError: INVALID_ARGUMENT if the file cannot be read, is too large or is no JSON of that form.
    """
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            raise _refused(f"the file of changed ranges {path} is larger than {FILE_BYTES_MAX // MIB} MiB")
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise _refused(f"the file of changed ranges {path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise _refused(f"the file of changed ranges {path} is no JSON: {error}") from error
    if not isinstance(found, list | dict):
        raise _refused(f"the file {path} holds neither a list of [offset, length] pairs nor such lists by volume name")
    return found


def _refused(message: str) -> HoldfastError:
    return HoldfastError(ErrorCode.INVALID_ARGUMENT, message)
