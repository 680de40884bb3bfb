"""`holdfast tenant create|list|quota`: tenants and what they may have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from holdfast.cli.connection import Connection, on_cluster
from holdfast.cli.output import print_json, print_line, print_table
from holdfast_core.runtime.options import format_size, parse_size

if TYPE_CHECKING:
    from holdfast_proto.v1.tenants_pb2 import Quota, TenantRecord, Usage

app = typer.Typer(no_args_is_help=True, help="Tenants: make, list, bound.")

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Name of the tenant.")]
BytesOption = Annotated[
    str, typer.Option("--bytes", metavar="SIZE", help="Bytes that its points and objects may add up to; 0 for any.")
]
ObjectsOption = Annotated[
    int, typer.Option("--objects", metavar="N", min=0, help="Stored objects that it may have; 0 for any number.")
]
VmsOption = Annotated[int, typer.Option("--vms", metavar="N", min=0, help="VMs that it may have; 0 for any number.")]


@app.command("create")
@on_cluster
def create(
    connection: Connection,
    name: NameArgument,
    size: BytesOption = "0",
    objects: ObjectsOption = 0,
    vms: VmsOption = 0,
    own_data_key: Annotated[
        bool,
        typer.Option("--own-data-key", help="The tenant keeps its data secret to itself; its callers give --key-file."),
    ] = False,
) -> None:
    """Make a tenant with keys of its own; the same again changes nothing."""
    from holdfast_proto.v1.tenants_pb2 import CreateTenantRequest
    from holdfast_proto.v1.tenants_pb2_grpc import TenantServiceStub

    request = CreateTenantRequest(name=name, quota=_quota(size, objects, vms), own_data_key=own_data_key)
    answer = connection.call(lambda channel: TenantServiceStub(channel).CreateTenant, request)
    _print_made(connection, answer.tenant)


@app.command("quota")
@on_cluster
def quota(
    connection: Connection,
    name: NameArgument,
    size: BytesOption = "0",
    objects: ObjectsOption = 0,
    vms: VmsOption = 0,
) -> None:
    """Set what a tenant may have, all three bounds at once; what it has already stays."""
    from holdfast_proto.v1.tenants_pb2 import SetQuotaRequest
    from holdfast_proto.v1.tenants_pb2_grpc import TenantServiceStub

    request = SetQuotaRequest(name=name, quota=_quota(size, objects, vms))
    answer = connection.call(lambda channel: TenantServiceStub(channel).SetQuota, request)
    _print_made(connection, answer.tenant)


@app.command("list")
@on_cluster
def list_tenants(connection: Connection) -> None:
    """List tenants, what they have and what they may have."""
    from holdfast_proto.v1.tenants_pb2 import ListTenantsRequest
    from holdfast_proto.v1.tenants_pb2_grpc import TenantServiceStub

    answer = connection.call(lambda channel: TenantServiceStub(channel).ListTenants, ListTenantsRequest())
    if connection.json:
        print_json([_facts(each.tenant, each.usage) for each in answer.tenants])
        return
    rows = [
        (
            each.tenant.name,
            str(each.tenant.tenant),
            _of(format_size(each.usage.bytes), format_size(each.tenant.quota.bytes), each.tenant.quota.bytes),
            _of(str(each.usage.objects), str(each.tenant.quota.objects), each.tenant.quota.objects),
            _of(str(each.usage.vms), str(each.tenant.quota.vms), each.tenant.quota.vms),
            "its own" if each.tenant.own_data_key else "with the cluster",
        )
        for each in answer.tenants
    ]
    print_table(("NAME", "NUMBER", "BYTES", "OBJECTS", "VMS", "DATA KEY"), rows)


def _quota(size: str, objects: int, vms: int) -> Quota:
    from holdfast_proto.v1.tenants_pb2 import Quota

    return Quota(bytes=parse_size(size), objects=objects, vms=vms)


def _of(have: str, bound: str, is_bound: int) -> str:
    return f"{have} of {bound}" if is_bound else have


def _facts(record: TenantRecord, usage: Usage | None = None) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "name": record.name,
        "number": record.tenant,
        "quota": {"bytes": record.quota.bytes, "objects": record.quota.objects, "vms": record.quota.vms},
        "own_data_key": record.own_data_key,
    }
    if usage is not None:
        facts["usage"] = {"bytes": usage.bytes, "objects": usage.objects, "vms": usage.vms}
    return facts


def _print_made(connection: Connection, record: TenantRecord) -> None:
    if connection.json:
        print_json(_facts(record))
    else:
        print_line(record.name)
