"""A master key in Vault: real HTTP against a small server on loopback that speaks the transit engine's two calls."""

from __future__ import annotations

import base64
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from holdfast_coordinator.keys.master import MasterKeys
from holdfast_coordinator.keys.vault import VaultMasterKey, VaultToken, parse_vault_key
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.clock import ManualClock
from holdfast_core.runtime.metadata.sqlite import SqliteStore
from holdfast_proto.v1.records_pb2 import WrappedSecret
from tests.coordinator.key_rig import file_key, make_entry, open_keys
from tests.coordinator.rig import refused

TOKEN = "hvs.very-secret-token"


class Transit(ThreadingHTTPServer):
    """Speaks `POST /v1/transit/encrypt|decrypt/holdfast` as Vault does, as far as a client can tell."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.key = AESGCM(os.urandom(32))
        self.status = 0
        self.body: bytes | None = None
        self.calls = 0

    @property
    def text(self) -> str:
        """What names its key on a command line."""
        return f"vault:http://127.0.0.1:{self.server_port}/transit/holdfast"


class _Handler(BaseHTTPRequestHandler):
    server: Transit

    def do_POST(self) -> None:
        server = self.server
        server.calls += 1
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if server.status or server.body is not None:
            self._answer(server.status or 200, server.body or b'{"errors":["Vault is sealed"]}')
        elif self.headers["X-Vault-Token"] != TOKEN:
            self._errors(403, "permission denied")
        elif self.path == "/v1/transit/encrypt/holdfast":
            nonce = os.urandom(12)
            sealed = nonce + server.key.encrypt(nonce, base64.b64decode(request["plaintext"]), None)
            self._data({"ciphertext": "vault:v1:" + base64.b64encode(sealed).decode(), "key_version": 1})
        elif self.path == "/v1/transit/decrypt/holdfast":
            sealed = base64.b64decode(request["ciphertext"].removeprefix("vault:v1:"))
            try:
                plain = server.key.decrypt(sealed[:12], sealed[12:], None)
            except InvalidTag:
                self._errors(400, "cipher: message authentication failed")
            else:
                self._data({"plaintext": base64.b64encode(plain).decode()})
        else:
            self._errors(404, "no handler for route")

    def _data(self, data: dict[str, object]) -> None:
        self._answer(200, json.dumps({"data": data}).encode())

    def _errors(self, status: int, text: str) -> None:
        self._answer(status, json.dumps({"errors": [text]}).encode())

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def transit() -> Iterator[Transit]:
    """A Vault on loopback."""
    server = Transit()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def key_of(transit: Transit, token: VaultToken | None = None) -> VaultMasterKey:
    return VaultMasterKey(parse_vault_key(transit.text), token or VaultToken(TOKEN))


async def test_what_vault_wraps_it_opens_for_the_same_purpose_alone(transit: Transit) -> None:
    key = key_of(transit)
    wrapped = await key.wrap(b"\0secret", "tenant/1")
    assert wrapped.master_fingerprint == key.fingerprint
    assert wrapped.ciphertext.startswith(b"vault:v1:")
    assert await key.unwrap(wrapped, "tenant/1") == b"\0secret"
    await refused(ErrorCode.CORRUPT, key.unwrap(wrapped, "tenant/10"))
    await refused(ErrorCode.CORRUPT, key.unwrap(wrapped, "signing/1"))
    await refused(ErrorCode.CORRUPT, key.unwrap(WrappedSecret(ciphertext=b"\xff"), "tenant/1"))


async def test_a_cluster_lives_under_vault_and_moves_there_from_a_file(
    transit: Transit, store: SqliteStore, clock: ManualClock
) -> None:
    held = await (await open_keys(store, clock)).chain.secrets(1)
    moving = await open_keys(store, clock, MasterKeys(key_of(transit), [file_key()]))
    assert await moving.rewrapping.run(make_entry()) == 4
    keys = await open_keys(store, clock, MasterKeys(key_of(transit)))
    assert await keys.chain.secrets(1) == held
    calls = transit.calls
    await keys.chain.fresh()
    assert transit.calls == calls, "what is known is not opened again"
    transit.key = AESGCM(os.urandom(32))
    error = await refused(ErrorCode.KEY_MISMATCH, open_keys(store, clock, MasterKeys(key_of(transit))))
    assert "transit/holdfast" in error.message


@pytest.mark.parametrize(
    ("code", "disturb"),
    [
        (ErrorCode.UNREACHABLE, lambda server: setattr(server, "status", 503)),
        (ErrorCode.UNREACHABLE, lambda server: setattr(server, "status", 429)),
        (ErrorCode.UNREACHABLE, lambda server: setattr(server, "status", 307)),
        (ErrorCode.NOT_FOUND, lambda server: setattr(server, "status", 404)),
        (ErrorCode.INTERNAL, lambda server: setattr(server, "status", 405)),
        (ErrorCode.DENIED, lambda server: setattr(server, "status", 403)),
        (ErrorCode.KEY_MISMATCH, lambda server: setattr(server, "key", AESGCM(bytes(32)))),
        (ErrorCode.UNREACHABLE, lambda server: setattr(server, "body", b"<html>hello</html>")),
        (ErrorCode.UNREACHABLE, lambda server: setattr(server, "body", b"[]")),
        (ErrorCode.UNREACHABLE, lambda server: setattr(server, "body", b'{"data":{"plaintext":7}}')),
        (ErrorCode.UNREACHABLE, lambda server: setattr(server, "body", b'{"data":{"plaintext":"###"}}')),
    ],
)
async def test_each_trouble_has_its_own_answer(
    transit: Transit, code: ErrorCode, disturb: Callable[[Transit], None]
) -> None:
    key = key_of(transit)
    wrapped = await key.wrap(b"secret", "tenant/1")
    disturb(transit)
    error = await refused(code, key.unwrap(wrapped, "tenant/1"))
    assert TOKEN not in f"{error}{error.__cause__!r}"


async def test_vault_that_is_down_is_unreachable() -> None:
    server = Transit()
    key = key_of(server)
    server.server_close()
    await refused(ErrorCode.UNREACHABLE, key.wrap(b"secret", "tenant/1"))


async def test_the_token_is_read_at_each_call_and_shown_nowhere(
    transit: Transit, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    file = tmp_path / "token"
    file.write_text("old")
    key = key_of(transit, VaultToken(file=file))
    errors = [await refused(ErrorCode.DENIED, key.wrap(b"secret", "tenant/1"))]
    file.write_text(TOKEN + "\n")
    wrapped = await key.wrap(b"secret", "tenant/1")
    wrong = [key_of(transit, VaultToken(token)) for token in ("", TOKEN + "\nX: y", "hvs.\u00fc" + TOKEN)]
    errors += [await refused(ErrorCode.DENIED, each.unwrap(wrapped, "tenant/1")) for each in wrong]
    file.unlink()
    errors.append(await refused(ErrorCode.DENIED, key.unwrap(wrapped, "tenant/1")))
    shown = "".join(map(str, errors)) + caplog.text + repr(key) + repr(VaultToken(TOKEN, file))
    assert TOKEN not in shown


@pytest.mark.parametrize(
    "text",
    [
        "vault:",
        "vault:https://",
        "vault:https://host:8200/",
        "vault:https://host:8200/key",
        "vault:https://host:port/transit/key",
        "vault:https://user@host/transit/key",
        "vault:https://host/transit/key?x=1",
        "vault:ftp://host/transit/key",
        "vault:http://host/transit/key",
    ],
)
def test_what_names_no_key_of_vault(text: str) -> None:
    with pytest.raises(HoldfastError) as caught:
        parse_vault_key(text)
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT


def test_a_key_is_recognised_by_its_engine_and_name_wherever_vault_answers() -> None:
    one = parse_vault_key("vault:https://one:8200/team/transit/holdfast")
    assert (one.mount, one.name, one.port) == ("team/transit", "holdfast", 8200)
    assert one.fingerprint == parse_vault_key("vault:https://two/team/transit/holdfast").fingerprint
    assert one.fingerprint != parse_vault_key("vault:https://one:8200/team/transit/other").fingerprint
