"""The one distribution: what it holds, what a bare install needs, and what importing the SDK loads."""

from __future__ import annotations

import email.message
import email.parser
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Final

import pytest

from tests.meta.tree import PRODUCT_FOLDERS, ROOT, tracked

PACKAGES: Final = {"holdfast_proto", "holdfast_core", "holdfast", "holdfast_coordinator", "holdfast_storagenode"}

THIN: Final = {
    "blake3",
    "cryptography",
    "grpcio",
    "lz4",
    "mmh3",
    "protobuf",
    "pyfastcdc",
    "rich",
    "typer",
    "zstandard",
}
"""What a bare install needs. A new name here is a decision, not a convenience."""

SERVER_ONLY: Final = ("grpc_health", "grpc_reflection", "jwt", "lmdb", "prometheus_client", "structlog")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built by the pinned backend without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=60)
    (built,) = folder.glob("*.whl")
    return zipfile.ZipFile(built)


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> email.message.Message:
    """The wheel's METADATA."""
    (name,) = [each for each in wheel.namelist() if each.endswith(".dist-info/METADATA")]
    return email.parser.BytesParser().parsebytes(wheel.read(name))


def test_the_wheel_holds_the_five_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    top = {name.partition("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == PACKAGES
    for package in PACKAGES:
        assert f"{package}/py.typed" in wheel.namelist()


def test_the_wheel_holds_every_product_file(wheel: zipfile.ZipFile) -> None:
    wanted = {str(Path(*path.parts[1:])) for path in tracked() if path.parts[0] in PRODUCT_FOLDERS}
    assert wanted <= set(wheel.namelist())


def test_a_bare_install_is_thin(metadata: email.message.Message) -> None:
    bare = set()
    for requirement in metadata.get_all("Requires-Dist", []):
        if "extra ==" not in requirement:
            name = re.match(r"[\w.-]+", requirement)
            assert name
            bare.add(name.group().lower())
    assert bare == THIN


def test_the_wheel_names_its_licence_and_extras(wheel: zipfile.ZipFile, metadata: email.message.Message) -> None:
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert set(metadata.get_all("Provides-Extra", [])) == {"agent", "server", "vault", "vm"}
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())


BLOCKER: Final = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"a bare install has no {name}", name=name)
BLOCKED = frozenset(sys.argv[1].split(","))
sys.meta_path.insert(0, Blocker())
"""


def run_without(modules: tuple[str, ...], code: str) -> subprocess.CompletedProcess[str]:
    """Run Python where the modules named cannot be imported."""
    command = [sys.executable, "-c", BLOCKER + code, ",".join(modules)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_the_blocker_blocks() -> None:
    refused = run_without(SERVER_ONLY, "import structlog")
    assert "a bare install has no structlog" in refused.stderr


def test_the_sdk_and_its_command_load_nothing_of_the_server_extra() -> None:
    code = (
        "import holdfast, holdfast.testing, holdfast.cli.main\n"
        "names = {name.partition('.')[0] for name in sys.modules}\n"
        "assert not names & {'sqlite3', 'holdfast_coordinator', 'holdfast_storagenode'}, names\n"
    )
    ran = run_without(SERVER_ONLY, code)
    assert ran.returncode == 0, ran.stderr


def test_help_works_in_a_bare_install() -> None:
    code = "sys.argv = ['holdfast', '--help']\nimport holdfast.cli.main\nholdfast.cli.main.main()\n"
    ran = run_without(SERVER_ONLY, code)
    assert ran.returncode == 0, ran.stderr
    assert "snapshot" in ran.stdout


def test_a_server_in_a_bare_install_says_what_to_install() -> None:
    code = "sys.argv = ['holdfast', 'coordinator', '--data', 'x']\nimport holdfast.cli.main\nholdfast.cli.main.main()\n"
    ran = run_without(SERVER_ONLY, code)
    assert ran.returncode == 2, ran.stderr
    assert "holdfast[server]" in ran.stderr
    assert "Traceback" not in ran.stderr
