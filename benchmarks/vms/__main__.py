"""`make bench-vms`, or `python -m benchmarks.vms`: what VMs gain, with the goals, and the JSON of it."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from benchmarks.image import MIB, load_or_build
from benchmarks.machine import this_machine
from benchmarks.vms.bitmap import measure_bitmap
from benchmarks.vms.boot import measure_boots
from benchmarks.vms.dirty import DIRTY_BYTES, measure_growth, measure_peers
from benchmarks.vms.goals import judge
from benchmarks.vms.lineage import measure_lineage
from benchmarks.vms.second import measure_second

_PARTS: Final = ("dirty", "bitmap", "growth", "second", "lineage", "lineage-churned", "boot")


def main() -> None:
    """Measure what the command line asks for, and say which goals are met."""
    parser = argparse.ArgumentParser(prog="make bench-vms", description=__doc__)
    parser.add_argument("--runs", type=int, default=3, help="turns of each; medians are taken (default 3)")
    parser.add_argument("--only", default=",".join(_PARTS), help=f"parts, out of {','.join(_PARTS)}")
    parser.add_argument("--cache", type=Path, default=Path(".bench"), help="where images are kept (default .bench)")
    parser.add_argument("--json", type=Path, help="where all figures go")
    arguments = parser.parse_args()
    parts = arguments.only.split(",")
    if unknown := set(parts) - set(_PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}")
    # Each start would compile every module again, which no installed program does, the peers included.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    cache, runs = arguments.cache.resolve(), arguments.runs
    work = cache / "vms"
    result: dict[str, Any] = {"machine": asdict(this_machine())}
    small = load_or_build(cache, size_bytes=1024 * MIB, say=_say)
    images = load_or_build(cache, size_bytes=4096 * MIB, say=_say)
    if "dirty" in parts:
        result["dirty"] = measure_peers(images, work, runs, _say)
    if "bitmap" in parts:
        result["bitmap"] = measure_bitmap(images.path(0), work, runs, DIRTY_BYTES, _say)
    if "growth" in parts:
        result["growth"] = measure_growth(small.path(0), work, runs, _say)
    if "second" in parts:
        result["second"] = measure_second(images, work, _say)
    if "lineage" in parts:
        result["lineage"] = measure_lineage(images.path(0), work, runs, _say)
    if "lineage-churned" in parts:
        # A fifth of the image is the database: what deltas cost a restore shows more than on a usual disk.
        result["lineage-churned"] = measure_lineage(small.path(0), work, runs, _say)
    if "boot" in parts:
        result["boot"] = measure_boots(cache, work, runs, _say)
    _say("")
    for verdict in judge(result):
        _say(f"{'met  ' if verdict.met else 'SHORT'}  {verdict.text}: {verdict.figure}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
        _say(f"kept as {arguments.json}")


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
