"""Writes the golden files anew: `python -m tests.golden.regenerate --formats-have-changed`.

Only for a change of bytes that is meant: stored data has the old bytes, so a format gets a new version beside the old
one, and the change is said in CHANGELOG.md.
"""

from __future__ import annotations

import sys

from tests.golden.formats import FOLDER, FORMATS

SWITCH = "--formats-have-changed"


def main(arguments: list[str]) -> int:
    """Write every file if the switch is there; returns the exit code."""
    if arguments != [SWITCH]:
        sys.stderr.write(f"nothing written: pass {SWITCH} if the bytes of a format shall change\n")
        return 2
    FOLDER.mkdir(exist_ok=True)
    for name, make in FORMATS.items():
        (FOLDER / name).write_bytes(make())
        sys.stdout.write(f"wrote {name}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
