"""The options of `holdfast coordinator`, each also read from a variable of the environment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

Data: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        envvar="HOLDFAST_DATA",
        help="Directory for the embedded metadata and, unless named elsewhere, the master key. Not needed with --etcd "
        "and --master-key.",
    ),
]
Bind: TypeAlias = Annotated[str, typer.Option(envvar="HOLDFAST_BIND", help="HOST:PORT to serve on.")]
EtcdAddresses: TypeAlias = Annotated[
    str | None,
    typer.Option(envvar="HOLDFAST_ETCD", help="HOST:PORT[,…] of etcd; without it metadata is embedded in --data."),
]
EtcdCa: TypeAlias = Annotated[Path | None, typer.Option(envvar="HOLDFAST_ETCD_CA", help="CA of etcd's certificates.")]
EtcdCert: TypeAlias = Annotated[
    Path | None, typer.Option(envvar="HOLDFAST_ETCD_CERT", help="Own certificate towards etcd.")
]
EtcdKey: TypeAlias = Annotated[Path | None, typer.Option(envvar="HOLDFAST_ETCD_KEY", help="Key of that certificate.")]
EtcdUser: TypeAlias = Annotated[
    str, typer.Option(envvar="HOLDFAST_ETCD_USER", help="User of etcd; its password is in HOLDFAST_ETCD_PASSWORD.")
]
EtcdPassword: TypeAlias = Annotated[str, typer.Option(envvar="HOLDFAST_ETCD_PASSWORD", hidden=True)]
Nodes: TypeAlias = Annotated[
    int | None,
    typer.Option(envvar="HOLDFAST_NODES", help="Storage nodes to wait for before the first layout forms."),
]
Replicas: TypeAlias = Annotated[
    int | None,
    typer.Option(envvar="HOLDFAST_REPLICAS", help="Copies of each block, fixed when the cluster is made (3)."),
]
Partitions: TypeAlias = Annotated[
    int | None,
    typer.Option(
        envvar="HOLDFAST_PARTITIONS", help="Partitions, a power of two, fixed when the cluster is made (4096)."
    ),
]
OutAfter: TypeAlias = Annotated[
    float,
    typer.Option(
        envvar="HOLDFAST_OUT_AFTER",
        metavar="SECONDS",
        min=1.0,
        help="Time that a node is down before its data is put on the others.",
    ),
]
CollectEvery: TypeAlias = Annotated[
    float,
    typer.Option(
        envvar="HOLDFAST_COLLECT_EVERY",
        metavar="SECONDS",
        min=0.0,
        help="Time between collections that begin by themselves; 0 for none.",
    ),
]
Scratch: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        envvar="HOLDFAST_SCRATCH",
        help="Directory for what a collection cannot keep in memory; --data if not given, or where temporary files go.",
    ),
]
MasterKey: TypeAlias = Annotated[
    str | None,
    typer.Option(
        envvar="HOLDFAST_MASTER_KEY",
        metavar="FILE|vault:URL",
        help="The master key: a file of 32 raw bytes or 64 hexadecimal digits (DATA/master.key), or "
        "vault:https://HOST:8200/MOUNT/KEY for a transit key of HashiCorp Vault.",
    ),
]
OldMasterKey: TypeAlias = Annotated[
    str | None,
    typer.Option(
        envvar="HOLDFAST_OLD_MASTER_KEY",
        metavar="FILE|vault:URL[,…]",
        help="Master keys that secrets may still be wrapped by, until `holdfast keys rewrap` has run.",
    ),
]
CreateMasterKey: TypeAlias = Annotated[
    bool,
    typer.Option(
        envvar="HOLDFAST_CREATE_MASTER_KEY", help="Make the master key if there is none. Losing it loses the data."
    ),
]
AdminTokenFile: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        envvar="HOLDFAST_ADMIN_TOKEN_FILE",
        help="File of the token of the principal admin (DATA/admin.token, if it is there).",
    ),
]
NodeTokenFile: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        envvar="HOLDFAST_NODE_TOKEN_FILE",
        help="File of the token of the principal node (DATA/node.token, if it is there).",
    ),
]
PlaintextOnNetwork: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--insecure-plaintext-on-network",
        envvar="HOLDFAST_INSECURE_PLAINTEXT_ON_NETWORK",
        help="Bind any address without TLS, for a network that encrypts below; keys are still released to this machine "
        "alone.",
    ),
]
Metrics: TypeAlias = Annotated[
    str | None, typer.Option(envvar="HOLDFAST_METRICS", help="HOST:PORT of the Prometheus metrics page.")
]
TlsCa: TypeAlias = Annotated[Path | None, typer.Option(envvar="HOLDFAST_TLS_CA", help="CA that signs all parties.")]
TlsCert: TypeAlias = Annotated[Path | None, typer.Option(envvar="HOLDFAST_TLS_CERT", help="Own certificate.")]
TlsKey: TypeAlias = Annotated[Path | None, typer.Option(envvar="HOLDFAST_TLS_KEY", help="Key of that certificate.")]
LogLevel: TypeAlias = Annotated[str, typer.Option(envvar="HOLDFAST_LOG_LEVEL", help="debug, info, warning or error.")]
