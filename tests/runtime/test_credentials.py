"""Which token a caller sends, where it is found, and that it stays out of what people read."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

import pytest

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.credentials import (
    Credential,
    find_credential,
    home_token_file,
    new_token,
    parse_token,
    write_token,
)

LOCAL = "127.0.0.1:7400"
GIVEN, IN_FILE, IN_VARIABLE, IN_NAMED_FILE, AT_HOME = (new_token(os.urandom) for _ in range(5))


def sent(credential: Credential) -> str:
    """The token that goes with a call; empty for none."""
    return dict(credential.metadata()).get("authorization", "").removeprefix("Bearer ")


def kept(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_token(path, text)
    return path


def test_what_is_closest_wins(tmp_path: Path) -> None:
    """Each place is taken away in turn, and the next one counts."""
    file = kept(tmp_path / "file", IN_FILE)
    variables = {
        "HOLDFAST_TOKEN": IN_VARIABLE,
        "HOLDFAST_TOKEN_FILE": str(kept(tmp_path / "named", IN_NAMED_FILE)),
        "HOLDFAST_HOME": str(tmp_path / "home"),
    }
    kept(tmp_path / "home" / "tokens" / LOCAL, AT_HOME)

    def found(environment: Mapping[str, str], **options: str | Path) -> str:
        return sent(find_credential(["unix:/run/x", LOCAL], environment=environment, **options))  # type: ignore[arg-type]

    assert found(variables, token=GIVEN, token_file=file) == GIVEN
    assert found(variables, token_file=file) == IN_FILE
    for name, text in (("HOLDFAST_TOKEN", IN_VARIABLE), ("HOLDFAST_TOKEN_FILE", IN_NAMED_FILE)):
        assert found(variables) == text
        del variables[name]
    assert found(variables) == AT_HOME
    assert found({"HOLDFAST_HOME": str(tmp_path / "another")}) == ""


@pytest.mark.parametrize(
    ("address", "found"),
    [
        ("127.0.0.1:7400", True),
        ("localhost:7400", True),
        ("127.0.0.1:7401", False),
        ("[::1]:7400", False),
        ("192.0.2.7:7400", False),
        ("coordinator-1:7400", False),
        ("unix:/run/holdfast.sock", False),
    ],
)
def test_the_home_is_looked_at_for_this_machine_alone(tmp_path: Path, address: str, found: bool) -> None:
    kept(tmp_path / "tokens" / LOCAL, AT_HOME)
    kept(tmp_path / "tokens" / "192.0.2.7:7400", AT_HOME)
    credential = find_credential([address], environment={"HOLDFAST_HOME": str(tmp_path)})
    assert sent(credential) == (AT_HOME if found else "")
    certified = find_credential([address], certificate=True, environment={"HOLDFAST_HOME": str(tmp_path)})
    assert sent(certified) == ""


def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    environment = {"HOLDFAST_HOME": str(tmp_path)}
    path = home_token_file(LOCAL, environment)
    named = find_credential([LOCAL], token_file=path, environment=environment)
    at_home = find_credential([LOCAL], environment=environment)
    with pytest.raises(HoldfastError, match="cannot be read") as caught:
        sent(named)
    assert caught.value.code is ErrorCode.UNAUTHENTICATED
    # A cluster that is not there yet has no token yet.
    assert sent(at_home) == ""
    for text in (AT_HOME, GIVEN):
        kept(path, text)
        assert sent(named) == sent(at_home) == text
    path.write_text("hft_nonsense\n")
    for credential in (named, at_home):
        with pytest.raises(HoldfastError, match="holds no token") as caught:
            sent(credential)
        assert caught.value.code is ErrorCode.UNAUTHENTICATED
        assert "nonsense" not in caught.value.message
    path.unlink()
    assert sent(at_home) == ""


def test_a_tenant_goes_with_the_call() -> None:
    assert dict(find_credential([LOCAL], tenant="north", environment={"HOLDFAST_TENANT": "x"}).metadata()) == {
        "holdfast-tenant": "north"
    }
    assert dict(find_credential(["192.0.2.7:1"], environment={"HOLDFAST_TENANT": "south"}).metadata()) == {
        "holdfast-tenant": "south"
    }
    with pytest.raises(HoldfastError, match="tenant name"):
        find_credential([LOCAL], tenant="a/b", environment={})


def test_tokens_have_one_form() -> None:
    text = new_token(lambda count: bytes(range(count)))
    assert parse_token(text) == ("0001020304050607", bytes(range(32)))
    assert parse_token(new_token(bytes, "0" * 16)) == ("0" * 16, bytes(32))
    for wrong in (text[:-1], text + "A", text.lower(), text.upper(), f"{text}\n", "", text.replace("hft", "ghp")):
        with pytest.raises(HoldfastError) as caught:
            parse_token(wrong)
        assert caught.value.code is ErrorCode.INVALID_ARGUMENT
        assert not wrong or wrong not in caught.value.message


def test_a_token_is_seen_by_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("older, and open to all")
    path.chmod(0o666)
    write_token(path, GIVEN)
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == (f"{GIVEN}\n", 0o600)
    assert [entry.name for entry in tmp_path.iterdir()] == ["token"]
    credential = find_credential([LOCAL], token_file=path, environment={})
    assert sent(credential) == GIVEN
    assert GIVEN not in repr(credential)
    with pytest.raises(OSError, match="directory"):
        write_token(tmp_path / "absent" / "token", GIVEN)
