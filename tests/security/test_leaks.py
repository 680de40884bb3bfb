"""No plaintext, no key and no token lies on a disk or in a log of a cluster that was busy (invariant 5)."""

from __future__ import annotations

import base64
import os

import pytest

from holdfast_core.runtime.credentials import parse_token
from tests.security.rig import NODES, VM, Run, forms, found_in, log_lines, secret_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


def test_no_disk_and_no_log_holds_plaintext_a_key_or_a_token(busy: Run) -> None:
    keys = busy.secrets()
    tokens = {f"token {name}": secret_of(text) for name, text in busy.tokens.items()}
    raw = {f"bytes of token {name}": parse_token(text)[1] for name, text in busy.tokens.items() if text[:4] == "hft_"}
    assert len(busy.plaintext) == 16
    assert len(keys) >= 1 + 2 + 2 + 6 + 8 + 2 + 2
    assert found_in(busy.files, busy.plaintext | keys | tokens | raw) == []


def test_the_search_sees_what_is_there(busy: Run) -> None:
    """The files are the run's, the logs say all they can, and whatever is put into a file is found in each form."""
    sizes = {name: sum(len(data) for path, data in busy.files.items() if f"/{name}" in path) for name in NODES}
    assert min(sizes.values()) > 20 * 64 * 1024
    metadata = b"".join(data for path, data in busy.files.items() if "metadata.sqlite" in path)
    assert VM.encode() in metadata
    names = ("coordinator", *NODES)
    logs = {name: log_lines(busy.files[str(busy.folder / "logs" / f"{name}.log")]) for name in names}
    assert {line["level"] for line in logs["coordinator"]} >= {"debug", "info"}
    assert all(logs.values())
    assert any(path.endswith("sdk.log") and data for path, data in busy.files.items())

    secret = os.urandom(32)
    path, data = max(busy.files.items(), key=lambda item: len(item[1]))
    for form in forms(secret):
        assert found_in({path: data + form + data[:9]}, {"planted": secret}) == [("planted", path)]
    for before in range(4):
        hidden = base64.b64encode(os.urandom(before) + secret + os.urandom(5))
        assert found_in({"a": b"x" + hidden}, {"planted": secret}) == [("planted", "a")]
    assert found_in({"a": repr({"key": secret}).encode()}, {"planted": secret}) == [("planted", "a")]
    assert found_in({"a": secret[:-1]}, {"planted": secret}) == []
