"""The tests' own machines: a guest boots, obeys, keeps what it wrote; a machine without a guest does as it is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.guest import Drive, Guest, make_root
from tests.support.qemu import MonitorError, Qemu, tool


@pytest.mark.slow
def test_a_guest_boots_to_login_runs_commands_and_keeps_what_it_wrote(tmp_path: Path) -> None:
    root = make_root(tmp_path / "root.img", files={"/etc/greeting": b"hello\n"})
    data = tmp_path / "data.img"
    with data.open("wb") as image:
        image.truncate(8 << 20)
    with Guest([Drive.raw("root", root), Drive.raw("data", data)]) as guest:
        guest.wait_for_login()
        assert guest.run("cat /etc/greeting") == "hello\n"
        guest.run("echo kept >/srv/file; echo raw | dd of=/dev/vdb bs=4096 seek=1 conv=notrunc; sync")
        with pytest.raises(AssertionError, match="ended with 3"):
            guest.run("exit 3")
        guest.shut_down()
    assert tool("debugfs", "-R", "cat /srv/file", root).startswith("kept\n")
    with data.open("rb") as image:
        image.seek(4096)
        assert image.read(4) == b"raw\n"


@pytest.mark.slow
def test_the_guest_agent_freezes_the_guests_file_systems(tmp_path: Path) -> None:
    root = make_root(tmp_path / "root.img", agent=True)
    with Guest([Drive.raw("root", root)], agent=True) as guest:
        guest.wait_for_login()
        assert guest.agent_answers()


def test_a_machine_without_a_guest_writes_as_it_is_told(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    with Qemu([Drive.raw("disk", image)]) as qemu:
        qemu.write("disk", 65536, 4096, 0x5A)
        qemu.io("disk", "flush")
        with pytest.raises(MonitorError):
            qemu.execute("no-such-command")
        qemu.quit()
    content = image.read_bytes()
    assert content[65536 : 65536 + 4096] == b"\x5a" * 4096
    assert content.count(0) == (1 << 20) - 4096
