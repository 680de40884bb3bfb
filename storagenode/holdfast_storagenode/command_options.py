"""The options of `holdfast storagenode`, each also read from a variable of the environment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

Data: TypeAlias = Annotated[
    Path, typer.Option(envvar="HOLDFAST_DATA", help="Directory of the node's blocks and identity.")
]
Coordinator: TypeAlias = Annotated[
    str, typer.Option(envvar="HOLDFAST_COORDINATOR", help="HOST:PORT[,…] of the coordinators.")
]
NodeId: TypeAlias = Annotated[
    str | None,
    typer.Option(envvar="HOLDFAST_NODE_ID", help="Name of a new node (the machine's); fixed by its directory."),
]
Zone: TypeAlias = Annotated[
    str, typer.Option(envvar="HOLDFAST_ZONE", help="Failure domain; copies are put in distinct ones.")
]
Bind: TypeAlias = Annotated[str, typer.Option(envvar="HOLDFAST_BIND", help="HOST:PORT to serve on.")]
Advertise: TypeAlias = Annotated[
    str | None, typer.Option(envvar="HOLDFAST_ADVERTISE", help="HOST:PORT that others reach this node on.")
]
Capacity: TypeAlias = Annotated[
    str | None, typer.Option(envvar="HOLDFAST_CAPACITY", help="Bytes for blocks, e.g. 500GiB (the whole file system).")
]
Reserve: TypeAlias = Annotated[
    str | None,
    typer.Option(envvar="HOLDFAST_RESERVE", help="Bytes of the file system to leave free (a twentieth, at most 1GiB)."),
]
Metrics: TypeAlias = Annotated[
    str | None, typer.Option(envvar="HOLDFAST_METRICS", help="HOST:PORT of the Prometheus metrics page.")
]
ScrubDays: TypeAlias = Annotated[
    float, typer.Option(envvar="HOLDFAST_SCRUB_DAYS", help="Days in which every block is read and hashed once.")
]
RepairGentleness: TypeAlias = Annotated[
    float,
    typer.Option(
        envvar="HOLDFAST_REPAIR_GENTLENESS",
        help="While clients are at work, wait so many times as long as each piece of repair took (0: never).",
    ),
]
CompareEvery: TypeAlias = Annotated[
    float,
    typer.Option(
        envvar="HOLDFAST_COMPARE_EVERY",
        metavar="SECONDS",
        help="Time between two rounds in which what is held is compared with the other owners.",
    ),
]
TlsCa: TypeAlias = Annotated[Path | None, typer.Option(envvar="HOLDFAST_TLS_CA", help="CA that signs all parties.")]
TlsCert: TypeAlias = Annotated[Path | None, typer.Option(envvar="HOLDFAST_TLS_CERT", help="Own certificate.")]
TlsKey: TypeAlias = Annotated[Path | None, typer.Option(envvar="HOLDFAST_TLS_KEY", help="Key of that certificate.")]
TokenFile: TypeAlias = Annotated[
    Path | None,
    typer.Option(envvar="HOLDFAST_TOKEN_FILE", help="File of a token to join with, where no certificate says who."),
]
PlaintextOnNetwork: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--insecure-plaintext-on-network",
        envvar="HOLDFAST_INSECURE_PLAINTEXT_ON_NETWORK",
        help="Bind any address without TLS, for a network that encrypts below.",
    ),
]
LogLevel: TypeAlias = Annotated[str, typer.Option(envvar="HOLDFAST_LOG_LEVEL", help="debug, info, warning or error.")]
