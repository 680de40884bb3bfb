"""`holdfast access`: who may do what. Tokens, bindings, the policy document, revoked certificates."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from holdfast.cli.connection import Connection, on_cluster
from holdfast.cli.exits import say
from holdfast.cli.output import format_time, print_facts, print_json, print_line, print_table
from holdfast_core.model.errors import ErrorCode, HoldfastError

if TYPE_CHECKING:
    from holdfast_core.model.access.policy import BindingRule, Policy
    from holdfast_proto.v1.access_pb2 import TokenRecord

app = typer.Typer(no_args_is_help=True, help="Who may do what: tokens, bindings, the policy, revoked certificates.")
token_app = typer.Typer(no_args_is_help=True, help="API tokens.")
policy_app = typer.Typer(no_args_is_help=True, help="The policy as one document.")
certificate_app = typer.Typer(no_args_is_help=True, help="Certificates that are refused before their time is over.")
app.add_typer(token_app, name="token")
app.add_typer(policy_app, name="policy")
app.add_typer(certificate_app, name="certificate")

_DAY_S: Final = 86_400
# How often a binding is put into a policy that others change at the same time.
_TRIES: Final = 5

PrincipalArgument = Annotated[
    str, typer.Argument(metavar="PRINCIPAL", help="A name, or the URI of a certificate; may be a pattern with *.")
]
RoleArgument = Annotated[
    str,
    typer.Argument(
        metavar="ROLE",
        help="admin, operator, backup-writer, restorer, app-writer, app-reader, auditor, node, or one of the policy's.",
    ),
]
OnOption = Annotated[str, typer.Option("--on", metavar="PATTERN", help="What it is for, e.g. 'vm/web-*'.")]
EverywhereOption = Annotated[
    bool, typer.Option("--everywhere", help="In all tenants and the cluster itself, not in --tenant alone.")
]


@app.command("whoami")
@on_cluster
def whoami(connection: Connection) -> None:
    """Say who the cluster takes you for, and what you hold."""
    from holdfast_proto.v1.access_pb2 import WhoAmIRequest
    from holdfast_proto.v1.access_pb2_grpc import AccessServiceStub

    found = connection.call(lambda channel: AccessServiceStub(channel).WhoAmI, WhoAmIRequest())
    bindings = [(each.principal, each.role, each.tenant, each.resource) for each in found.bindings]
    if connection.json:
        names = ("principal", "role", "tenant", "resource")
        listed = [dict(zip(names, each, strict=True)) for each in bindings]
        facts = {"principal": found.principal, "proof": found.proof, "tenant": found.tenant}
        print_json({**facts, "bindings": listed})
        return
    print_facts({"principal": found.principal, "proven by": found.proof, "tenant": found.tenant or "-"})
    print_table(("BOUND", "ROLE", "TENANT", "ON"), bindings)


@token_app.command("create")
@on_cluster
def create_token(
    connection: Connection,
    principal: Annotated[str, typer.Argument(metavar="PRINCIPAL", help="Whom it stands for: a name, or a URI.")],
    days: Annotated[int, typer.Option("--days", metavar="N", min=1, max=366, help="How long it is good for.")] = 90,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="FILE", help="Write it to this new file instead, for its owner alone."),
    ] = None,
) -> None:
    """Make a token and print it, once: nobody can show it again."""
    import secrets

    from holdfast_core.model.access.tokens import token_hash
    from holdfast_core.runtime.credentials import new_token, parse_token
    from holdfast_proto.v1.access_pb2 import CreateTokenRequest
    from holdfast_proto.v1.access_pb2_grpc import AccessServiceStub

    text = new_token(secrets.token_bytes)
    token_id, secret = parse_token(text)
    request = CreateTokenRequest(
        principal=principal, ttl_s=days * _DAY_S, token_id=token_id, secret_hash=token_hash(secret)
    )
    # Written first: a file of a token that does not exist harms nobody, and a token without its text helps nobody.
    if output is not None:
        _write_new(output, text)
    try:
        made = connection.call(lambda channel: AccessServiceStub(channel).CreateToken, request).record
    except HoldfastError:
        if output is not None:
            with suppress(OSError):
                output.unlink()
        raise
    where = {"token": text} if output is None else {"file": str(output)}
    if connection.json:
        print_json(where | _token_facts(made))
    else:
        print_line(text if output is None else str(output))
    if output is None:
        say("the token is shown this once; keep it where its owner alone can read it")


@token_app.command("list")
@on_cluster
def list_tokens(connection: Connection) -> None:
    """List tokens, without what they prove."""
    from holdfast_proto.v1.access_pb2 import ListTokensRequest
    from holdfast_proto.v1.access_pb2_grpc import AccessServiceStub

    found = connection.call(lambda channel: AccessServiceStub(channel).ListTokens, ListTokensRequest()).tokens
    if connection.json:
        print_json([_token_facts(each) for each in found])
        return
    rows = [
        (
            each.token_id,
            each.principal,
            format_time(each.created_unix_ms),
            format_time(each.expires_unix_ms),
            each.created_by,
        )
        for each in found
    ]
    print_table(("ID", "PRINCIPAL", "MADE", "ENDS", "BY"), rows)


@token_app.command("revoke")
@on_cluster
def revoke_token(
    connection: Connection, token_id: Annotated[str, typer.Argument(metavar="ID", help="Its id, as listed.")]
) -> None:
    """End a token at once."""
    from holdfast_proto.v1.access_pb2 import RevokeTokenRequest
    from holdfast_proto.v1.access_pb2_grpc import AccessServiceStub

    connection.call(lambda channel: AccessServiceStub(channel).RevokeToken, RevokeTokenRequest(token_id=token_id))


@app.command("grant")
@on_cluster
def grant(
    connection: Connection,
    principal: PrincipalArgument,
    role: RoleArgument,
    on: OnOption = "*",
    everywhere: EverywhereOption = False,
) -> None:
    """Bind a principal to a role."""
    binding = _binding(connection, principal, role, on, everywhere)
    _change_policy(connection, lambda policy: policy.bound(binding))
    _print_binding(connection, binding)


@app.command("ungrant")
@on_cluster
def ungrant(
    connection: Connection,
    principal: PrincipalArgument,
    role: RoleArgument,
    on: OnOption = "*",
    everywhere: EverywhereOption = False,
) -> None:
    """Take a binding away; it has to be named as it was made."""
    binding = _binding(connection, principal, role, on, everywhere)

    def without(policy: Policy) -> Policy:
        if binding not in policy.bindings:
            raise HoldfastError(
                ErrorCode.NOT_FOUND,
                f"there is no such binding: {_words(binding)}; `holdfast access policy show` has those that there are",
            )
        return policy.unbound(binding)

    _change_policy(connection, without)
    _print_binding(connection, binding)


@policy_app.command("show")
@on_cluster
def show_policy(connection: Connection) -> None:
    """Print the policy document."""
    from holdfast_proto.v1.access_pb2 import GetPolicyRequest
    from holdfast_proto.v1.access_pb2_grpc import AccessServiceStub

    found = connection.call(lambda channel: AccessServiceStub(channel).GetPolicy, GetPolicyRequest())
    if connection.json:
        print_json({"revision": found.revision, "document": found.document})
    else:
        print_line(found.document.removesuffix("\n"))


@policy_app.command("set")
@on_cluster
def set_policy(
    connection: Connection, file: Annotated[Path, typer.Argument(metavar="FILE", help="The whole new document.")]
) -> None:
    """Put another policy in the place of the present one. A malformed one is refused and nothing changes."""
    from holdfast_proto.v1.access_pb2 import SetPolicyRequest
    from holdfast_proto.v1.access_pb2_grpc import AccessServiceStub

    try:
        document = _read(file).decode()
    except UnicodeDecodeError as error:
        raise HoldfastError(ErrorCode.INVALID_ARGUMENT, f"{file} is not in UTF-8: {error.reason}") from error
    request = SetPolicyRequest(document=document)
    revision = connection.call(lambda channel: AccessServiceStub(channel).SetPolicy, request).revision
    if connection.json:
        print_json({"revision": revision})
    else:
        print_line("policy set")


@certificate_app.command("revoke")
@on_cluster
def revoke_certificate(
    connection: Connection,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The certificate (PEM); its key is not needed.")],
) -> None:
    """Refuse a certificate from now on, although its authority is trusted and its time is not over."""
    from holdfast_proto.v1.access_pb2 import RevokeCertificateRequest
    from holdfast_proto.v1.access_pb2_grpc import AccessServiceStub

    fingerprint, principal = _certificate(file)
    request = RevokeCertificateRequest(fingerprint=fingerprint, principal=principal)
    connection.call(lambda channel: AccessServiceStub(channel).RevokeCertificate, request)
    if connection.json:
        print_json({"fingerprint": fingerprint, "principal": principal})
    else:
        print_line(fingerprint.hex())


@certificate_app.command("list")
@on_cluster
def list_certificates(connection: Connection) -> None:
    """List revoked certificates."""
    from holdfast_proto.v1.access_pb2 import ListRevokedCertificatesRequest
    from holdfast_proto.v1.access_pb2_grpc import AccessServiceStub

    request = ListRevokedCertificatesRequest()
    found = connection.call(lambda channel: AccessServiceStub(channel).ListRevokedCertificates, request).certificates
    if connection.json:
        names = ("fingerprint", "principal", "revoked_unix_ms")
        print_json([{name: getattr(each, name) for name in names} for each in found])
        return
    rows = [(each.fingerprint.hex(), each.principal or "-", format_time(each.revoked_unix_ms)) for each in found]
    print_table(("FINGERPRINT", "PRINCIPAL", "REVOKED"), rows)


def _binding(connection: Connection, principal: str, role: str, on: str, everywhere: bool) -> BindingRule:
    from holdfast_core.model.access.policy import BindingRule

    return BindingRule(principal, role, "*" if everywhere else connection.tenant or "default", on)


def _change_policy(connection: Connection, change: Callable[[Policy], Policy]) -> None:
    """Read the policy, change it here, and set it if nobody else did meanwhile; else begin anew."""
    from holdfast_core.model.access.policy import Policy
    from holdfast_proto.v1.access_pb2 import GetPolicyRequest, SetPolicyRequest
    from holdfast_proto.v1.access_pb2_grpc import AccessServiceStub

    for left in reversed(range(_TRIES)):
        found = connection.call(lambda channel: AccessServiceStub(channel).GetPolicy, GetPolicyRequest())
        policy = Policy.parse(found.document)
        changed = change(policy)
        if changed == policy:
            return
        request = SetPolicyRequest(document=changed.to_document(), revision=found.revision)
        try:
            connection.call(lambda channel: AccessServiceStub(channel).SetPolicy, request)
        except HoldfastError as error:
            if error.code is not ErrorCode.CONFLICT or not left:
                raise
        else:
            return


def _print_binding(connection: Connection, binding: BindingRule) -> None:
    if connection.json:
        print_json(binding)
    else:
        print_line(_words(binding))


def _words(binding: BindingRule) -> str:
    where = "everywhere" if binding.tenant == "*" else f"in {binding.tenant}"
    return f"{binding.principal} {binding.role} on {binding.resource} {where}"


def _token_facts(record: TokenRecord) -> dict[str, Any]:
    names = ("token_id", "principal", "created_unix_ms", "expires_unix_ms", "created_by")
    return {name: getattr(record, name) for name in names}


def _certificate(file: Path) -> tuple[bytes, str]:
    """Return the fingerprint of a PEM certificate, and the principal that it names, if it names one."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes

    from holdfast_core.model.access.policy import check_principal

    try:
        certificate = x509.load_pem_x509_certificate(_read(file))
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except x509.ExtensionNotFound:
        uris = []
    except ValueError as error:
        raise HoldfastError(ErrorCode.INVALID_ARGUMENT, f"{file} is no certificate in PEM: {error}") from error
    principal = ""
    if len(uris) == 1:
        # One that names nobody can be revoked as well.
        with suppress(HoldfastError):
            principal = check_principal(uris[0])
    return certificate.fingerprint(hashes.SHA256()), principal


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise HoldfastError(ErrorCode.INVALID_ARGUMENT, f"{file} cannot be read: {error.strerror}") from error


def _write_new(path: Path, text: str) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    except FileExistsError as error:
        raise HoldfastError(ErrorCode.TARGET_EXISTS, f"{path} is there already; name a new file") from error
    except OSError as error:
        raise HoldfastError(ErrorCode.TARGET_UNWRITABLE, f"{path} cannot be written: {error.strerror}") from error
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(f"{text}\n")
