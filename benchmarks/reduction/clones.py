"""Deduplication: VMs copied from one template, each with a name, keys, logs and packages of its own."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from benchmarks.packages import Package, content_bytes
from benchmarks.reduction.cluster import allocated_bytes, check_restored, fresh_cluster, last_stats, on_disk_bytes
from benchmarks.reduction.disks import STATUS, Content, Template, copy_sparse, put_files, status_text
from benchmarks.reduction.rows import TEMPLATES, Row, Share
from holdfast.results import TransferStats

MB: Final = 1_000_000
_VOLUME: Final = "disk"
_PROGRAMS: Final = ("systemd[1]", "kernel", "sshd[612]", "cron[498]", "dhclient[377]", "cloud-init[455]", "agent[731]")
_MESSAGES: Final = (
    "Started session {0} of user debian.",
    "Accepted publickey for debian from 10.20.{1}.{2} port {0} ssh2",
    "bound to 10.20.{1}.{2} -- renewal in {0} seconds.",
    "(root) CMD (test -x /usr/sbin/anacron || run-parts --report /etc/cron.hourly)",
    "task {0} finished in {1}.{2} s with status 0",
)


@dataclass(frozen=True, slots=True)
class Clones:
    """How many VMs, and how much of each is its own.

    Attributes:
        count: VMs.
        packages_bytes: files of the packages that each installs for itself.
        log_bytes: what each has logged.
    """

    count: int = 8
    packages_bytes: int = 24 * MB
    log_bytes: int = 2 * MB


def measure_clones(template: Template, plan: Clones, *, work: Path, say: Callable[[str], None]) -> Row:
    """Save the template, then each VM with it as its template.

    Raises:
        benchmarks.reduction.cluster.WrongBytes: a VM was not restored as it was saved.
    """
    work.mkdir()
    stats: list[TransferStats] = []
    allocated = []
    with fresh_cluster(work / "cluster") as manager:
        manager.register_vm("template", {_VOLUME: template.image})
        template_id = manager.create_snapshot("template")
        first = last_stats(manager)
        for number in range(plan.count):
            image = work / "clone.img"
            copy_sparse(template.image, image)
            individualise(image, template, plan, number, scratch=work / "scratch")
            name = f"vm-{number + 1}"
            manager.register_vm(name, {_VOLUME: image}, template=template_id)
            point_id = manager.create_snapshot(name)
            stats.append(last_stats(manager))
            allocated.append(allocated_bytes(manager, point_id))
            say(f"  {name}: {allocated[-1] / 1e6:.0f} MB, of it new {stats[-1].stored_plain_bytes / 1e6:.1f} MB")
            if number == plan.count - 1:
                check_restored(manager, (point_id, ""), {_VOLUME: image}, work / "restored")
            image.unlink()
    return clones_row(first, stats, allocated, plan, kept_bytes=on_disk_bytes(work / "cluster"))


def clones_row(
    template: TransferStats, vms: Sequence[TransferStats], allocated: Sequence[int], plan: Clones, *, kept_bytes: int
) -> Row:
    """Return the row of a template and its VMs; what the template stored counts as stored, its disk not as a VM."""
    whole = sum(allocated)
    everything = [template, *vms]
    return Row(
        name="deduplication, VMs of one template",
        goal=TEMPLATES,
        workload=(
            f"{len(vms)} VMs copied from one Debian disk (ext4), each with its own host name, machine id, SSH host "
            f"keys, {plan.log_bytes / 1e6:.0f} MB of logs and {plan.packages_bytes / 1e6:.0f} MB of packages"
        ),
        formula="1 - plaintext newly stored, template and index included / plaintext of the VMs' allocated blocks",
        figure=Share("plaintext", sum(each.stored_plain_bytes for each in everything), whole),
        beside=(
            Share("sealed bytes over the same, compression included", sum(s.stored_bytes for s in everything), whole),
            Share("the VMs alone, once the template is stored", sum(s.stored_plain_bytes for s in vms), whole),
            Share("the VMs alone, sealed bytes", sum(s.stored_bytes for s in vms), whole),
        ),
        facts={
            "template stored bytes": template.stored_bytes,
            "least allocated bytes of a VM": min(allocated, default=0),
            "delta blocks": sum(s.delta_blocks for s in vms),
            "bytes on the node's disk": kept_bytes,
        },
    )


def individualise(image: Path, template: Template, plan: Clones, number: int, *, scratch: Path) -> None:
    """Make a copy of the template into a VM that has booted and worked."""
    dice = random.Random(number)
    host = f"vm-{number + 1:03}"
    machine_id = f"{dice.getrandbits(128):032x}"
    own = own_packages(template.others, plan.packages_bytes, dice)
    files: dict[PurePosixPath, Content] = {
        PurePosixPath("/etc/hostname"): f"{host}\n".encode(),
        PurePosixPath("/etc/hosts"): f"127.0.0.1 localhost\n127.0.1.1 {host}\n".encode(),
        PurePosixPath("/etc/machine-id"): f"{machine_id}\n".encode(),
        PurePosixPath("/var/lib/systemd/random-seed"): dice.randbytes(512),
        PurePosixPath("/var/log/syslog"): log(host, plan.log_bytes, dice),
        STATUS: status_text([*template.packages, *own]),
        PurePosixPath("/var/log/dpkg.log"): "".join(
            f"2026-11-{dice.randrange(1, 23):02} 09:12:{at % 60:02} status installed {package.name}\n"
            for at, package in enumerate([*template.packages, *own])
        ).encode(),
        **host_keys(host),
    }
    for package in own:
        files |= {PurePosixPath(path): path for path in package.paths if PurePosixPath(path) not in template.places}
    put_files(image, files, there=template.places, scratch=scratch)


def own_packages(others: Sequence[Package], wanted_bytes: int, dice: random.Random) -> list[Package]:
    """Draw packages until they have about `wanted_bytes`."""
    drawn: list[Package] = []
    for package in dice.sample(others, len(others)):
        if content_bytes(drawn) + package.content_bytes <= wanted_bytes:
            drawn.append(package)
    return drawn


def host_keys(host: str) -> dict[PurePosixPath, Content]:
    """Return SSH host keys of the usual three kinds, freshly made."""
    keys: dict[str, ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey] = {
        "ed25519": ed25519.Ed25519PrivateKey.generate(),
        "ecdsa": ec.generate_private_key(ec.SECP256R1()),
        "rsa": rsa.generate_private_key(public_exponent=65537, key_size=3072),
    }
    files: dict[PurePosixPath, Content] = {}
    for kind, key in keys.items():
        place = PurePosixPath(f"/etc/ssh/ssh_host_{kind}_key")
        public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        files[place] = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
        )
        files[place.with_name(f"{place.name}.pub")] = public + f" root@{host}\n".encode()
    return files


def log(host: str, size_bytes: int, dice: random.Random) -> bytes:
    """Return about `size_bytes` of a system's log."""
    lines = []
    size = 0
    seconds = dice.randrange(86_400)
    while size < size_bytes:
        seconds += dice.randrange(4)
        clock = f"{seconds // 3600 % 24:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
        said = dice.choice(_MESSAGES).format(dice.randrange(65_536), dice.randrange(256), dice.randrange(256))
        lines.append(f"Nov 22 {clock} {host} {dice.choice(_PROGRAMS)}: {said}\n")
        size += len(lines[-1])
    return "".join(lines).encode()
