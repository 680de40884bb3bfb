"""What import-linter is told in pyproject.toml, shown to bite, and the rules that it cannot express."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from tests.meta import checks
from tests.meta.tree import PRODUCT_FOLDERS, ROOT, is_generated, parsed, python_files, tracked

STATUS_FILE: Final = "core/holdfast_core/runtime/status.py"
ETCD_PROTOCOL: Final = "holdfast_proto.v1.etcd_pb2"
METADATA: Final = "core/holdfast_core/runtime/metadata"


def test_grpc_status_codes_are_in_one_file() -> None:
    users = {str(path) for path in python_files(*PRODUCT_FOLDERS) if checks.status_code_uses(parsed(path))}
    assert users == {STATUS_FILE}


def test_etcd_is_spoken_by_its_client_alone() -> None:
    users = [
        path
        for path in python_files(*PRODUCT_FOLDERS)
        if any(name.startswith(ETCD_PROTOCOL) for _, name in checks.imported_modules(parsed(path)))
    ]
    assert users, "nobody speaks to etcd"
    assert all(str(path).startswith(f"{METADATA}/etcd") for path in users)


def test_sqlite_is_imported_in_one_file() -> None:
    users = {
        str(path)
        for path in python_files(*PRODUCT_FOLDERS)
        if any(name.partition(".")[0] == "sqlite3" for _, name in checks.imported_modules(parsed(path)))
    }
    assert users == {f"{METADATA}/sqlite.py"}


def test_a_code_folder_holds_one_package_and_nothing_else() -> None:
    for folder in PRODUCT_FOLDERS:
        packages = {path.parts[1] for path in tracked() if path.parts[0] == folder}
        assert len(packages) == 1, folder
        assert next(iter(packages)).startswith("holdfast")


def test_generated_code_stays_beside_its_proto_file() -> None:
    generated = {path for path in tracked() if is_generated(path)}
    endings = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")
    wanted = {path.with_name(path.stem + ending) for path in tracked() if path.suffix == ".proto" for ending in endings}
    assert generated == wanted


PLANTED: Final = {
    "floors": ("core/holdfast_core/runtime/planted.py", "import holdfast"),
    "floors, sideways": ("client/holdfast/planted.py", "import holdfast_storagenode"),
    "floors, model above runtime": ("core/holdfast_core/model/planted.py", "import holdfast_core.runtime.status"),
    "pure-model": ("core/holdfast_core/model/planted.py", "import time"),
    "pure-model, network": ("core/holdfast_core/model/planted.py", "import grpc"),
    "thin-sdk": ("client/holdfast/planted.py", "import structlog"),
    "thin-sdk, through the runtime": ("client/holdfast/planted.py", "import holdfast_core.runtime.logs"),
    "sqlite-in-one-file": ("coordinator/holdfast_coordinator/planted.py", "import sqlite3"),
}


@pytest.mark.slow
@pytest.mark.parametrize("planted", PLANTED)
def test_the_import_contracts_refuse_what_they_should(planted: str, tmp_path: Path) -> None:
    file, line = PLANTED[planted]
    for folder in PRODUCT_FOLDERS:
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    contract = planted.partition(",")[0]
    assert lint_imports(tmp_path, contract).returncode == 0
    (tmp_path / file).write_text(f'"""Planted."""\n{line}\n', encoding="utf-8")
    refused = lint_imports(tmp_path, contract)
    assert refused.returncode != 0
    assert "planted" in refused.stdout


def lint_imports(folder: Path, contract: str) -> subprocess.CompletedProcess[str]:
    """Run import-linter for one contract over the copy of the tree in `folder`."""
    run = "import sys; from importlinter.cli import lint_imports_command; lint_imports_command()"
    return subprocess.run(
        [sys.executable, "-c", run, "--no-cache", "--no-logo", "--contract", contract],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(str(folder / name) for name in PRODUCT_FOLDERS)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
