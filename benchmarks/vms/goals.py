"""The figures that real VMs were to reach, and how a run stands to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

_PEERS: Final = ("restic", "borg tuned", "borg defaults", "casync")
DIRTY_FACTOR: Final = 10.0
GROWTH_FACTOR: Final = 1.3
LINEAGE_FACTOR: Final = 1.1
BOOT_FACTOR: Final = 1.25


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a goal came out: the goal in words, the figure, and whether that is enough."""

    text: str
    figure: str
    met: bool


def judge(result: Mapping[str, Any]) -> list[Verdict]:
    """Return verdicts on the goals whose parts were measured."""
    verdicts = []
    dirty = result.get("dirty", {})
    if "restic" in dirty:
        ratio = dirty["restic"] / dirty["holdfast"]
        verdicts.append(
            Verdict(
                f"25 MB dirty on 4 GiB, at most a tenth of restic's {dirty['restic']:.2f} s",
                f"{dirty['holdfast']:.3f} s, {ratio:.1f} times as fast",
                ratio >= DIRTY_FACTOR,
            )
        )
        if "bitmap" in result:
            ratio = dirty["restic"] / result["bitmap"]
            figure = f"{result['bitmap']:.3f} s, {ratio:.1f} times as fast"
            verdicts.append(
                Verdict("the same out of a running QEMU, by its dirty bitmap", figure, ratio >= DIRTY_FACTOR)
            )
    growth = result.get("growth")
    if growth:
        ratio = max(growth.values()) / min(growth.values())
        shown = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in growth.items())
        verdicts.append(
            Verdict("the same change on larger disks, within 1.3", f"{shown}: {ratio:.2f}", ratio <= GROWTH_FACTOR)
        )
    second = result.get("second", {})
    beside = {name: second[name] for name in _PEERS if name in second}
    if beside:
        least = min(beside, key=lambda name: beside[name])
        verdicts.append(
            Verdict(
                f"a second VM adds less than any peer ({least}: {beside[least] / 1e6:.1f} MB)",
                f"{second['holdfast'] / 1e6:.1f} MB",
                second["holdfast"] < beside[least],
            )
        )
    for part, where in (("lineage", ""), ("lineage-churned", " where a fifth of all blocks are deltas")):
        lineage = result.get(part)
        if lineage:
            ratio = lineage["fiftieth increment"] / lineage["snapshot"]
            verdicts.append(
                Verdict(
                    f"the fiftieth increment restored as fast as the snapshot, within 1.1{where}",
                    f"{lineage['fiftieth increment']:.2f} s against {lineage['snapshot']:.2f} s: {ratio:.2f}",
                    ratio <= LINEAGE_FACTOR,
                )
            )
    boot = result.get("boot")
    if boot:
        ratio = boot["over NBD"] / boot["local file"]
        verdicts.append(
            Verdict(
                "boot to login over NBD from a cold cluster, at most 1.25 times a local file",
                f"{boot['over NBD']:.1f} s against {boot['local file']:.1f} s: {ratio:.2f}",
                ratio <= BOOT_FACTOR,
            )
        )
    return verdicts
