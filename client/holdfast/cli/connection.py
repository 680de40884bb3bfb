"""The options that every command against a cluster takes, and the SDK's manager or the plain calls that they name.

They may stand before or after the command's name; what stands after wins, then what stands before, then the
environment.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Concatenate, Final, ParamSpec, TypeVar

import typer

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import RPC_TIMEOUT_S
from holdfast_core.runtime.options import TlsFiles, parse_addresses, tls_files

if TYPE_CHECKING:
    import grpc.aio
    from google.protobuf.message import Message

    from holdfast import AsyncStateManager, StateManager
    from holdfast_core.runtime.endpoints import Endpoints

Arguments = ParamSpec("Arguments")
Request = TypeVar("Request", bound="Message")
Response = TypeVar("Response", bound="Message")


@dataclass(frozen=True, slots=True)
class Connection:
    """Which cluster, how to reach it, and how to print what it says.

    Attributes:
        coordinator: HOST:PORT[,HOST:PORT], or None where nobody said.
        tls_ca, tls_cert, tls_key: PEM files for mutual TLS, or None.
        token_file: file of the API token, or None to look for one (see `find_credential`).
        tenant: name of the tenant, or None for HOLDFAST_TENANT or the caller's only one.
        key_file: file of a data key that the tenant keeps itself, or None.
        json: whether to print JSON.
    """

    coordinator: str | None = None
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    token_file: Path | None = None
    tenant: str | None = None
    key_file: Path | None = None
    json: bool = False

    def tls(self) -> TlsFiles | None:
        """Return the TLS files, or None for none.

        Raises:
            HoldfastError: INVALID_ARGUMENT if only some were given.
        """
        return tls_files(ca=self.tls_ca, cert=self.tls_cert, key=self.tls_key)

    @contextmanager
    def manager(self) -> Iterator[StateManager]:
        """Yield a manager for the cluster.

        Raises:
            HoldfastError: INVALID_ARGUMENT if no coordinator was named.
        """
        # Imported here: it brings gRPC and the codecs, which `--help` and mistyped commands need not wait for.
        from holdfast import StateManager

        with StateManager(
            self._named(), token_file=self.token_file, tenant=self.tenant, key_file=self.key_file, tls=self.tls()
        ) as manager:
            yield manager

    def asynchronous_manager(self, *, restore_dir: Path | None = None) -> AsyncStateManager:
        """Return a manager for the event loop that uses it first; the caller closes it.

        Raises:
            HoldfastError: INVALID_ARGUMENT if no coordinator was named.
        """
        from holdfast import AsyncStateManager

        return AsyncStateManager(
            self._named(),
            token_file=self.token_file,
            tenant=self.tenant,
            key_file=self.key_file,
            restore_dir=restore_dir,
            tls=self.tls(),
        )

    def async_manager(self) -> AsyncStateManager:
        """Return a manager for the cluster that belongs to the caller's event loop, to be closed by the caller.

        Raises:
            HoldfastError: INVALID_ARGUMENT if no coordinator was named.
        """
        from holdfast import AsyncStateManager

        return AsyncStateManager(
            self._named(), token_file=self.token_file, tenant=self.tenant, key_file=self.key_file, tls=self.tls()
        )

    def call(
        self,
        method: Callable[[grpc.aio.Channel], grpc.aio.UnaryUnaryMultiCallable[Request, Response]],
        request: Request,
        *,
        timeout_s: float = RPC_TIMEOUT_S,
    ) -> Response:
        """Make one call to a coordinator, for what the SDK's manager does not offer; may be used several times.

        E.g. `connection.call(lambda channel: KeyServiceStub(channel).ListKeys, ListKeysRequest())`. `timeout_s` bounds
        the try on each coordinator.

        Raises:
            HoldfastError: what the coordinator answered; UNREACHABLE if none did; INVALID_ARGUMENT if none was named.
        """

        async def ask() -> Response:
            endpoints = self._endpoints()
            try:
                return await endpoints.call(method, request, timeout_s=timeout_s)
            finally:
                await endpoints.close()

        return asyncio.run(ask())

    def stream(
        self,
        method: Callable[[grpc.aio.Channel], grpc.aio.UnaryStreamMultiCallable[Request, Response]],
        request: Request,
        *,
        timeout_s: float = RPC_TIMEOUT_S,
    ) -> Generator[Response, None, None]:
        """Make one call whose answers are a stream, and yield them; `timeout_s` bounds the wait for each.

        To be read to its end, or closed: `with closing(connection.stream(…)) as answers`.

        Raises:
            HoldfastError: as `call`, and UNREACHABLE where the stream breaks; what was yielded before stands.
        """
        with asyncio.Runner() as runner:
            endpoints = runner.run(self._opened())
            answers = endpoints.stream(method, request, timeout_s=timeout_s)
            try:
                while (answer := runner.run(_following(answers))) is not None:
                    yield answer
            finally:
                runner.run(answers.aclose())
                runner.run(endpoints.close())

    async def _opened(self) -> Endpoints:
        return self._endpoints()

    def _endpoints(self) -> Endpoints:
        from holdfast_core.runtime.credentials import find_credential
        from holdfast_core.runtime.endpoints import Endpoints

        addresses = parse_addresses(self._named())
        tls = self.tls()
        credential = find_credential(
            addresses, token_file=self.token_file, tenant=self.tenant, certificate=tls is not None
        )
        return Endpoints(addresses, tls=tls, credential=credential)

    def _named(self) -> str:
        if not self.coordinator:
            raise HoldfastError(
                ErrorCode.INVALID_ARGUMENT,
                "which cluster? give --coordinator HOST:PORT or set HOLDFAST_COORDINATOR (`holdfast up` prints it)",
            )
        return self.coordinator

    def under(self, outer: Connection) -> Connection:
        """Return this connection, with what is missing taken from the options that stood before the command."""
        return replace(
            self,
            coordinator=self.coordinator or outer.coordinator,
            tls_ca=self.tls_ca or outer.tls_ca,
            tls_cert=self.tls_cert or outer.tls_cert,
            tls_key=self.tls_key or outer.tls_key,
            token_file=self.token_file or outer.token_file,
            tenant=self.tenant or outer.tenant,
            key_file=self.key_file or outer.key_file,
            json=self.json or outer.json,
        )


@dataclass(frozen=True, slots=True)
class _Option:
    """One shared option. The environment is asked for only where the option stands before the command's name:
    asked after it, the environment would win over what was typed before.

    Attributes:
        late: whether its variable is not the option's: `find_credential` reads it, after others that win over it.
    """

    field: str
    metavar: str
    envvar: str
    help: str
    late: bool = False

    def parameter(self, *, before_command: bool) -> inspect.Parameter:
        flag = f"--{self.field.replace('_', '-')}"
        asks = before_command and not self.late
        option = typer.Option(
            flag,
            metavar=self.metavar,
            envvar=self.envvar if asks else None,
            help=self.help if asks else f"{self.help} [env var: {self.envvar}]",
        )
        kind = str if self.field in _TEXTS else Path
        return _keyword(self.field, Annotated[kind | None, option], None)


_TEXTS: Final = frozenset({"coordinator", "tenant"})
_OPTIONS: Final = (
    _Option("coordinator", "HOST:PORT[,HOST:PORT]", "HOLDFAST_COORDINATOR", "Where the cluster answers."),
    _Option("tls_ca", "FILE", "HOLDFAST_TLS_CA", "Certificates that sign the cluster's."),
    _Option("tls_cert", "FILE", "HOLDFAST_TLS_CERT", "Own certificate."),
    _Option("tls_key", "FILE", "HOLDFAST_TLS_KEY", "Its private key."),
    _Option("token_file", "FILE", "HOLDFAST_TOKEN_FILE", "File of the API token.", late=True),
    _Option("tenant", "NAME", "HOLDFAST_TENANT", "Tenant, where there are several."),
    _Option("key_file", "FILE", "HOLDFAST_KEY_FILE", "File of a data key that the tenant keeps itself."),
)
_JSON: Final = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


async def _following(answers: AsyncIterator[Response]) -> Response | None:
    return await anext(answers, None)


def remember(context: typer.Context, **values: Any) -> None:
    """Keep shared options for the command: as typed last, else as typed before, else from the environment."""
    outer = context.obj if isinstance(context.obj, Connection) else Connection()
    context.obj = Connection(**values).under(outer)


def on_cluster(command: Callable[Concatenate[Connection, Arguments], None]) -> Callable[..., None]:
    """Return `command` as typer can register it: its own parameters, and after them those of every cluster command.

    Typer builds a command's options from its signature, so the shared ones are written into it here, once, instead of
    into each of some twenty functions.
    """
    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]

    def run(context: typer.Context, **values: Any) -> None:
        mine = {parameter.name: values.pop(parameter.name) for parameter in own}
        remember(context, **values)
        command(context.obj, **mine)  # type: ignore[call-arg]  # the names are those of its own signature

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    return _with_parameters(run, [*own, *_shared(before_command=False)])


def root_options(callback: Callable[..., None]) -> Callable[..., None]:
    """Return the callback of the command as a whole, with the options that may stand before a command's name."""

    def run(context: typer.Context, **values: Any) -> None:
        shared = {each.name: values.pop(each.name) for each in _shared(before_command=True)}
        remember(context, **shared)
        callback(**values)

    run.__doc__ = callback.__doc__
    own = list(inspect.signature(callback, eval_str=True).parameters.values())
    return _with_parameters(run, [*own, *_shared(before_command=True)])


def _shared(*, before_command: bool) -> list[inspect.Parameter]:
    options = [option.parameter(before_command=before_command) for option in _OPTIONS]
    return [*options, _keyword("json", _JSON, False)]


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def _with_parameters(run: Callable[..., None], parameters: list[inspect.Parameter]) -> Callable[..., None]:
    context = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    everything = [context, *(each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in parameters)]
    run.__signature__ = inspect.Signature(everything)  # type: ignore[attr-defined]  # read by inspect.signature
    run.__annotations__ = {each.name: each.annotation for each in everything}
    return run
