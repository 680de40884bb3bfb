"""`make bench-healing`, or `python -m benchmarks.healing`: repair beside a plain copy, and what clients feel of it."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path

from benchmarks.healing.goals import judge
from benchmarks.healing.run import Sizes, measure
from benchmarks.machine import this_machine


def main() -> None:
    """Measure, and say which goals are met."""
    parser = argparse.ArgumentParser(prog="make bench-healing", description=__doc__)
    parser.add_argument("--bytes", type=float, default=2e9, help="blocks on the node that is lost (default 2e9)")
    parser.add_argument("--volume", type=float, default=2e8, help="a client's volume (default 2e8)")
    parser.add_argument("--turns", type=int, default=3, help="a client's turns beside each thing (default 3)")
    parser.add_argument("--json", type=Path, help="where all figures go")
    given = parser.parse_args()
    # Each start would compile every module again, which no installed program does.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sizes = Sizes(node_bytes=int(given.bytes), volume_bytes=int(given.volume), turns=given.turns)
    with tempfile.TemporaryDirectory(prefix="holdfast-healing-") as folder:
        result = {"machine": asdict(this_machine()), **measure(Path(folder), sizes, _say)}
    verdicts = judge(result)
    _say("")
    for verdict in verdicts:
        _say(f"{'met  ' if verdict.met else 'SHORT'}  {verdict.text}: {verdict.figure}")
    if given.json is not None:
        kept = {**result, "goals": [asdict(verdict) for verdict in verdicts]}
        given.json.write_text(json.dumps(kept, indent=1) + "\n")
        _say(f"kept as {given.json}")


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
