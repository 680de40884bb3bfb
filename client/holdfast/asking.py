"""When it is worth asking the owners which blocks they have before they are sent (ADR 0110). Pure."""

from __future__ import annotations

from typing import Final

from holdfast_core.model.limits import MIB

BARREN_BYTES: Final = 32 * MIB
"""So much was asked about in a row, and no owner had any of it, before offers are sent without a question."""


class Asking:
    """Decides, one offer after another, and learns from what was found.

    Whoever sends without asking hears it all the same: a node says of each block it is sent whether it had it. So a
    stretch of content that the cluster has is sent in vain for no longer than until the first answer.
    """

    def __init__(self) -> None:
        """Ask about everything at first."""
        self._barren_bytes = 0

    def is_worth_it(self) -> bool:
        """Return whether to ask about the next offer."""
        return self._barren_bytes < BARREN_BYTES

    def found_nothing(self, sealed_bytes: int) -> None:
        """Note that an offer was asked about and nobody had any of it."""
        self._barren_bytes += sealed_bytes

    def found(self) -> None:
        """Note that some owner had a block, whether it was asked or sent it."""
        self._barren_bytes = 0
