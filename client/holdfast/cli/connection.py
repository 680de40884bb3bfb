"""The options that every command against a cluster takes, and the SDK's manager that they name.

`--coordinator`, `--json` and the TLS files may stand before or after the command's name; what stands after wins, then
what stands before, then the environment.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Concatenate, Final, ParamSpec

import typer

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.options import TlsFiles, tls_files

if TYPE_CHECKING:
    from holdfast import StateManager

Arguments = ParamSpec("Arguments")


@dataclass(frozen=True, slots=True)
class Connection:
    """Which cluster, how to reach it, and how to print what it says.

    Attributes:
        coordinator: HOST:PORT[,HOST:PORT], or None where nobody said.
        tls_ca, tls_cert, tls_key: PEM files for mutual TLS, or None.
        json: whether to print JSON.
    """

    coordinator: str | None = None
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
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
        if not self.coordinator:
            raise HoldfastError(
                ErrorCode.INVALID_ARGUMENT,
                "which cluster? give --coordinator HOST:PORT or set HOLDFAST_COORDINATOR (`holdfast up` prints it)",
            )
        # Imported here: it brings gRPC and the codecs, which `--help` and mistyped commands need not wait for.
        from holdfast import StateManager

        with StateManager(self.coordinator, tls=self.tls()) as manager:
            yield manager

    def under(self, outer: Connection) -> Connection:
        """Return this connection, with what is missing taken from the options that stood before the command."""
        return replace(
            self,
            coordinator=self.coordinator or outer.coordinator,
            tls_ca=self.tls_ca or outer.tls_ca,
            tls_cert=self.tls_cert or outer.tls_cert,
            tls_key=self.tls_key or outer.tls_key,
            json=self.json or outer.json,
        )


@dataclass(frozen=True, slots=True)
class _Option:
    """One shared option. The environment is asked for only where the option stands before the command's name:
    asked after it, the environment would win over what was typed before.
    """

    field: str
    metavar: str
    envvar: str
    help: str

    def parameter(self, *, before_command: bool) -> inspect.Parameter:
        flag = f"--{self.field.replace('_', '-')}"
        option = typer.Option(
            flag,
            metavar=self.metavar,
            envvar=self.envvar if before_command else None,
            help=self.help if before_command else f"{self.help} [env var: {self.envvar}]",
        )
        kind = str if self.field == "coordinator" else Path
        return _keyword(self.field, Annotated[kind | None, option], None)


_OPTIONS: Final = (
    _Option("coordinator", "HOST:PORT[,HOST:PORT]", "HOLDFAST_COORDINATOR", "Where the cluster answers."),
    _Option("tls_ca", "FILE", "HOLDFAST_TLS_CA", "Certificates that sign the cluster's."),
    _Option("tls_cert", "FILE", "HOLDFAST_TLS_CERT", "Own certificate."),
    _Option("tls_key", "FILE", "HOLDFAST_TLS_KEY", "Its private key."),
)
_JSON: Final = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


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
