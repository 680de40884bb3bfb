"""Which paths of its host an agent touches for its callers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.uris import parse_volume_uri


class AllowedPaths:
    """Paths below some directories; without directories, every path that the agent's user may use.

    Links are followed before a path is judged. Who may write in one of the directories can still change a link
    afterwards, so they belong to the agent's callers as a whole.
    """

    def __init__(self, directories: Sequence[Path]) -> None:
        """Take the directories; they need not exist yet."""
        self._directories = tuple(Path(os.path.realpath(directory)) for directory in directories)

    def check(self, path: str) -> str:
        """Return the path if it may be used.

        Raises:
            HoldfastError: DENIED; INVALID_ARGUMENT for a relative path, which would be the agent's own.
        """
        if not os.path.isabs(path):
            raise HoldfastError(ErrorCode.INVALID_ARGUMENT, f"the path {path!r} is relative; give an absolute one")
        real = Path(os.path.realpath(path))
        if self._directories and not any(real.is_relative_to(directory) for directory in self._directories):
            raise HoldfastError(
                ErrorCode.DENIED, f"this agent does not touch {path}: it is below none of the directories it was given"
            )
        return path

    def check_volume(self, uri: str) -> str:
        """Return a volume's URI if everything on this host that it names may be used.

        Raises:
            HoldfastError: as `check`; DENIED for another host's export where the agent is confined; INVALID_ARGUMENT.
        """
        parsed = parse_volume_uri(uri)
        if parsed.host and self._directories:
            raise HoldfastError(ErrorCode.DENIED, f"this agent reads from the directories it was given, not from {uri}")
        parsed.with_paths(self.check)
        return uri
