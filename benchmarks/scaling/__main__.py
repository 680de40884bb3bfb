"""`python -m benchmarks.scaling`: slopes over blocks, points, nodes and tenants, and the JSON of them."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from benchmarks.machine import this_machine
from benchmarks.scaling.blocks import measure_blocks
from benchmarks.scaling.coordinators import measure_nodes, measure_points, measure_tenants
from benchmarks.scaling.layouts import measure_layouts

_PARTS: Final = ("layouts", "nodes", "blocks", "points", "tenants")
_LAYOUTS: Final = ((10, 4096), (100, 4096), (100, 65_536), (1000, 65_536), (10_000, 65_536))


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--only", default=",".join(_PARTS), help=f"parts, out of {','.join(_PARTS)}")
    parser.add_argument("--most", type=int, default=1_000_000, help="the most of anything; sizes above are left out")
    parser.add_argument("--json", type=Path, help="where all figures go; other parts that are there stay")
    given = parser.parse_args()
    parts = given.only.split(",")
    if unknown := set(parts) - set(_PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

    def sizes(*wanted: int) -> tuple[int, ...]:
        return tuple(size for size in wanted if size <= given.most)

    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="holdfast-scaling-") as name:
        folder = Path(name)
        if "layouts" in parts:
            result["layouts"] = measure_layouts([each for each in _LAYOUTS if each[0] <= given.most], _say)
        if "nodes" in parts:
            result["nodes"] = measure_nodes(folder, sizes(10, 100, 1000), _say)
        if "blocks" in parts:
            result["blocks"] = measure_blocks(folder, sizes(10_000, 100_000, 1_000_000), _say)
        if "points" in parts:
            result["points"] = measure_points(folder, sizes(10, 100, 1000, 10_000), _say)
        if "tenants" in parts:
            result["tenants"] = measure_tenants(folder, sizes(10, 100, 1000, 9000), _say)
    if given.json is not None:
        before = json.loads(given.json.read_text()) if given.json.exists() else {}
        kept = {**before, "machine": asdict(this_machine()), **result}
        given.json.write_text(json.dumps(kept, indent=1) + "\n")
        _say(f"kept as {given.json}")


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
