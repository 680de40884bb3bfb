"""What healing was to reach, and how a run stands to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

# Set here, by nobody else: three processes on the machine each write a third, and hash, send and receive it before.
COPY_FACTOR: Final = 3.0
CLIENT_SHARE: Final = 0.7


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a goal came out: the goal in words, the figure, and whether that is enough."""

    text: str
    figure: str
    met: bool


def judge(result: Mapping[str, Any]) -> list[Verdict]:
    """Return verdicts on all goals of a run."""
    copy_s, repair = min(result["copies_s"]), result["repair"]
    multiple = repair["changed_s"] / copy_s
    verdicts = [
        Verdict(
            f"{result['node_bytes'] / 1e9:.1f} GB of a lost node on three copies again, within {COPY_FACTOR:g} times "
            "their durable copy",
            f"{repair['changed_s']:.1f} s beside {copy_s:.1f} s: {multiple:.2f} times",
            multiple <= COPY_FACTOR,
        )
    ]
    clients = result["clients"]
    for during in ("repair", "scrub"):
        for what in ("backup", "restore"):
            beside, alone = clients[during][f"{what}_mb_s"], clients["undisturbed"][f"{what}_mb_s"]
            verdicts.append(
                Verdict(
                    f"{what} during a {during}, at least {CLIENT_SHARE:.0%} of undisturbed",
                    f"{beside:.0f} of {alone:.0f} MB/s: {beside / alone:.0%}",
                    beside >= CLIENT_SHARE * alone,
                )
            )
    return verdicts
