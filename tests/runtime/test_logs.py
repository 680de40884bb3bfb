"""Log lines: one JSON object each, no bytes, and libraries in the same form."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from holdfast_core.runtime.logs import configure_logs, get_log


@pytest.fixture(autouse=True)
def _restore_root_logger() -> Iterator[None]:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    yield
    root.handlers[:] = before
    root.setLevel(level)


def test_bytes_are_never_written() -> None:
    stream = io.StringIO()
    log = configure_logs("node", stream=stream)
    log.info("opened", key=b"k" * 32, block_id="ab", view=memoryview(b"plain"))
    line = json.loads(stream.getvalue())
    assert (line["key"], line["view"], line["block_id"]) == ("<32 bytes>", "<5 bytes>", "ab")
    assert "plain" not in stream.getvalue()
    assert (line["event"], line["service"], line["level"]) == ("opened", "node", "info")


def test_levels() -> None:
    stream = io.StringIO()
    log = configure_logs("node", level="warning", stream=stream)
    log.info("unseen")
    log.warning("seen")
    get_log("other").error("seen too")
    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == ["seen", "seen too"]
    with pytest.raises(KeyError):
        configure_logs("node", level="loud", stream=stream)


def test_libraries_speak_the_same_form() -> None:
    stream = io.StringIO()
    configure_logs("node", stream=stream)
    logging.getLogger("asyncio").error("Task %s was lost", "x")
    line = json.loads(stream.getvalue())
    assert (line["event"], line["service"], line["level"]) == ("Task x was lost", "node", "error")


def test_an_embedders_process_stays_quiet_and_shows_no_locals(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger().handlers[:] = [caplog.handler]
    logging.getLogger("holdfast").setLevel(logging.NOTSET)
    log = get_log("coordinator")
    secret = "key" * 11
    try:
        raise ValueError(len(secret))
    except ValueError:
        log.exception("fault")
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")
    assert "ValueError: 33" in caplog.text
    assert secret not in caplog.text
