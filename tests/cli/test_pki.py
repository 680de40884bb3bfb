"""`holdfast pki`: what it makes works between real services, and what it refuses."""

from __future__ import annotations

import json
import ssl
from pathlib import Path

import pytest
from cryptography import x509

from holdfast import pki
from holdfast.cli import main
from holdfast_coordinator.access.certificates import Certificates
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.channels import open_channel
from holdfast_core.runtime.clock import ManualClock, SystemClock
from holdfast_core.runtime.options import TlsFiles
from tests.runtime.services import running_host
from tests.runtime.test_channels import status_through

DAY_S = 86_400


def shifted(days: float) -> ManualClock:
    """A clock that is off by so many days."""
    return ManualClock(unix_ms=SystemClock().now_unix_ms() + int(days * DAY_S * 1000))


def make(folder: Path, name: str, kind: pki.Kind, **options: object) -> pki.Issued:
    """Issue a certificate from `folder`, where an authority is made first if there is none."""
    clock = options.pop("clock", SystemClock())
    assert isinstance(clock, SystemClock | ManualClock)
    if not (folder / "ca.pem").exists():
        pki.init_authority(folder, clock=shifted(-400))
    return pki.issue(folder, name, kind=kind, clock=clock, **options)  # type: ignore[arg-type]  # as the test says


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Run `holdfast pki …` in this process: exit code, stdout, stderr."""
    code = main.run(["pki", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_from_nothing_to_certificates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "pki"
    code, out, _ = run(capsys, "init", str(folder), "--trust-domain", "north.example")
    assert (code, out) == (0, f"{folder}/ca.pem\n")
    code, out, _ = run(capsys, "issue", str(folder), "node-1", "--kind", "node", "--host", "10.0.0.7", "--json")
    shown = json.loads(out)
    assert (code, shown["principal"]) == (0, "spiffe://north.example/node/node-1")
    assert Path(shown["folder"]) == folder / "node-1"
    days = (shown["ends_unix_ms"] - SystemClock().now_unix_ms()) / 1000 / DAY_S
    assert 89.9 < days <= 90
    code, out, _ = run(capsys, "issue", str(folder), "ann", "--kind", "admin", "-o", str(tmp_path / "ann"))
    assert code == 0
    assert "spiffe://north.example/admin/ann" in out

    modes = {path.relative_to(tmp_path).as_posix(): path.stat().st_mode & 0o777 for path in tmp_path.rglob("*.*")}
    private = {name for name, mode in modes.items() if mode == 0o600}
    assert private == {"pki/ca.key", "pki/node-1/key.pem", "ann/key.pem"}
    assert folder.stat().st_mode & 0o777 == 0o700

    certificate = x509.load_pem_x509_certificate((folder / "node-1" / "cert.pem").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert {str(host) for host in names.get_values_for_type(x509.IPAddress)} == {"10.0.0.7", "127.0.0.1", "::1"}
    assert names.get_values_for_type(x509.DNSName) == ["localhost"]
    read = Certificates().read((tmp_path / "ann" / "cert.pem").read_bytes())
    assert read.principal == "spiffe://north.example/admin/ann"


def test_renewing_in_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = make(tmp_path, "web", pki.Kind.CLIENT)
    before = first.files.cert.read_bytes()
    code, _, err = run(capsys, "issue", str(tmp_path), "web", "--kind", "client")
    assert (code, "--replace" in err) == (4, True)
    assert first.files.cert.read_bytes() == before
    assert run(capsys, "issue", str(tmp_path), "web", "--kind", "client", "--replace")[0] == 0
    assert first.files.cert.read_bytes() != before
    ssl.create_default_context(cafile=str(first.files.ca)).load_cert_chain(first.files.cert, first.files.key)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["init", "{old}"], 4, "exists"),
        (["init", "{new}", "--trust-domain", "North/1"], 2, "no trust domain"),
        (["init", "{file}/x"], 1, "cannot be written"),
        (["issue", "{new}", "web", "--kind", "client"], 3, "holdfast pki init"),
        (["issue", "{old}", "web"], 2, "--kind"),
        (["issue", "{old}", "web", "--kind", "root"], 2, "--kind"),
        (["issue", "{old}", "a/b", "--kind", "client"], 2, "is not allowed"),
        (["issue", "{old}", "web", "--kind", "node", "--host", "h:7400"], 2, "without a port"),
        (["issue", "{old}", "web", "--kind", "client", "--days", "4000"], 2, "the authority itself ends"),
        (["issue", "{old}", "web", "--kind", "client", "--days", "0"], 2, "--days"),
        (["issue", "{foreign}", "web", "--kind", "client"], 2, "belongs to no certificate"),
    ],
)
def test_refusals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, words: str
) -> None:
    places = {name: str(tmp_path / name) for name in ("old", "new", "foreign", "file")}
    for name in ("old", "foreign"):
        pki.init_authority(tmp_path / name, clock=SystemClock())
    (tmp_path / "foreign" / "ca.pem").write_bytes((tmp_path / "old" / "ca.pem").read_bytes())
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    got, out, err = run(capsys, *(each.format(**places) for each in arguments))
    assert (got, out) == (code, "")
    assert words in err
    assert sorted(tmp_path.rglob("*")) == before


async def talks(server: TlsFiles, client: TlsFiles) -> bool:
    """Whether a client with these files gets an answer of a server with those."""
    async with running_host(tls=server) as host:
        try:
            return bool(await status_through(open_channel(host.address, tls=client)))
        except HoldfastError as error:
            if error.code is not ErrorCode.UNREACHABLE:
                raise
            return False


@pytest.mark.parametrize("kind", pki.Kind)
async def test_each_kind_is_a_client_and_some_are_servers(tmp_path: Path, kind: pki.Kind) -> None:
    server = make(tmp_path, "coordinator-1", pki.Kind.COORDINATOR).files
    party = make(tmp_path, "party", kind, hosts=["127.0.0.1"]).files
    assert await talks(server, party)
    assert await talks(party, server) is kind.serves


async def test_bad_certificates_do_not_get_in(tmp_path: Path) -> None:
    server = make(tmp_path / "ours", "coordinator-1", pki.Kind.COORDINATOR).files
    bad = {
        "expired": make(tmp_path / "ours", "expired", pki.Kind.ADMIN, clock=shifted(-100), days=90),
        "early": make(tmp_path / "ours", "early", pki.Kind.ADMIN, clock=shifted(1)),
        "foreign": make(tmp_path / "theirs", "admin", pki.Kind.ADMIN),
    }
    good = make(tmp_path / "ours", "good", pki.Kind.ADMIN)
    half = TlsFiles(ca=server.ca, cert=bad["foreign"].files.cert, key=bad["foreign"].files.key)
    assert await talks(server, good.files)
    assert not [name for name, issued in bad.items() if await talks(server, issued.files)]
    assert not await talks(server, half)
    # A clock that is behind by less than what certificates are backdated for.
    soon = make(tmp_path / "ours", "soon", pki.Kind.CLIENT, clock=shifted(200 / DAY_S))
    assert await talks(server, soon.files)
    # And the other way round: a client takes no such server.
    late = make(tmp_path / "ours", "late", pki.Kind.COORDINATOR, clock=shifted(-100), days=90)
    assert not await talks(late.files, good.files)
