"""The measured client of Holdfast: one call of the SDK in a process of its own, as an orchestrator would make it.

Prints one line of JSON: the id or place that came out, `time.monotonic()` when the call's result stood, and what the
SDK says of the transfer. Commits at the write quorum, then waits for the copies that are still under way.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

from holdfast import StateManager, VolumeSpec
from holdfast.results import Codec
from holdfast_core.runtime.options import TlsFiles

VM = "bench"
VOLUME = "disk"
_COPIES_TIMEOUT_S = 600.0


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(prog="benchmarks.client")
    parser.add_argument("--tls", type=Path, metavar="FOLDER", help="where ca.pem, cert.pem and key.pem are")
    parser.add_argument("--token-file", type=Path)
    parser.add_argument("coordinator")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("register")
    verb.add_argument("disk", type=Path)
    verb.add_argument("codec", type=Codec)
    verb = verbs.add_parser("save")
    verb.add_argument("snapshot", nargs="?", default="")
    verb = verbs.add_parser("restore")
    verb.add_argument("snapshot")
    verb.add_argument("backup")
    verb.add_argument("target", type=Path)
    arguments = parser.parse_args()
    tls = None
    if arguments.tls is not None:
        tls = TlsFiles(ca=arguments.tls / "ca.pem", cert=arguments.tls / "cert.pem", key=arguments.tls / "key.pem")
    with StateManager(arguments.coordinator, tls=tls, token_file=arguments.token_file, replica_wait_s=0.0) as manager:
        if arguments.verb == "register":
            manager.register_vm(VM, {VOLUME: VolumeSpec(arguments.disk, codec=arguments.codec)})
        elif arguments.verb == "save":
            _save(manager, arguments.snapshot)
        else:
            place = manager.restore_vm(arguments.snapshot, arguments.backup, target=arguments.target)
            print(json.dumps({"result": str(place / f"{VOLUME}.raw"), "done_at": time.monotonic()}))


def _save(manager: StateManager, snapshot: str) -> None:
    started = time.monotonic()
    point = manager.incremental_backup(VM, snapshot) if snapshot else manager.create_snapshot(VM)
    done = time.monotonic()
    manager.settle(_COPIES_TIMEOUT_S)
    transfer = manager.last_transfer
    if transfer is None or transfer.replicated_s is None:
        raise SystemExit("not every owner has every block")
    print(
        json.dumps(
            {
                "result": point,
                "done_at": done,
                "replicated_at": started + transfer.replicated_s,
                "quorum_s": transfer.quorum_s,
                "committed_s": transfer.committed_s,
                "stats": asdict(transfer.stats),
            }
        )
    )


if __name__ == "__main__":
    main()
