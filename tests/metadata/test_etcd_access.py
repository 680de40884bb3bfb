"""Who may use an etcd: mutual TLS and password logins, against real members that ask for them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.metadata.etcd import EtcdStore
from holdfast_core.runtime.metadata.etcd_client import Login
from holdfast_core.runtime.metadata.store import Exists, Put
from holdfast_core.runtime.options import TlsFiles
from tests.support.etcd import EtcdCluster, free_ports, issue_tls, opened_etcd
from tests.support.waiting import wait_until

_SOON_S = 30.0


@pytest.fixture(scope="module")
def tls_etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    """An etcd that takes only clients with a certificate of its authority."""
    with EtcdCluster(1, tmp_path_factory.mktemp("etcd-tls"), tls=True) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def login_etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    """An etcd with accounts: `root`, and `user` who may use keys below mine/; tokens live for a second or two."""
    with EtcdCluster(1, tmp_path_factory.mktemp("etcd-login"), options=("--auth-token-ttl=1",)) as cluster:
        cluster.ctl("user", "add", "root:rootpw")
        cluster.ctl("user", "grant-role", "root", "root")
        cluster.ctl("role", "add", "mine")
        cluster.ctl("role", "grant-permission", "--prefix=true", "mine", "readwrite", "mine/")
        cluster.ctl("user", "add", "user:secret")
        cluster.ctl("user", "grant-role", "user", "mine")
        cluster.ctl("auth", "enable")
        yield cluster


async def _refused(cluster: EtcdCluster, *, tls: TlsFiles | None) -> HoldfastError:
    with pytest.raises(HoldfastError) as caught:
        await EtcdStore.open(cluster.endpoints, tls=tls, call_timeout_s=1.5)
    return caught.value


class TestTls:
    async def test_the_right_certificate(self, tls_etcd: EtcdCluster, prefix: str) -> None:
        async with (
            opened_etcd(tls_etcd.endpoints, tls=tls_etcd.tls_files) as store,
            contextlib.aclosing(store.watch(prefix)) as batches,
        ):
            assert (await anext(batches)).relisted
            written = await store.txn([], [Put(prefix + "k", b"")])
            assert (await anext(batches)).revision == written.revision

    async def test_each_member_is_known_by_the_name_it_was_reached_by(self, tls_etcd: EtcdCluster, prefix: str) -> None:
        """A dead member first, then one by name: no name stands for all of them, as with gRPC's own balancing."""
        (dead,) = free_ports(1)
        port = tls_etcd.endpoints[0].rpartition(":")[2]
        endpoints = [f"127.0.0.1:{dead}", f"localhost:{port}"]
        async with opened_etcd(endpoints, tls=tls_etcd.tls_files) as store:
            assert await store.get(prefix + "k") is None

    @pytest.mark.slow
    async def test_a_server_of_another_authority(self, tls_etcd: EtcdCluster, tmp_path: Path) -> None:
        assert tls_etcd.tls_files is not None
        foreign = issue_tls(tmp_path)
        error = await _refused(
            tls_etcd, tls=TlsFiles(ca=foreign.ca, cert=tls_etcd.tls_files.cert, key=tls_etcd.tls_files.key)
        )
        assert error.code is ErrorCode.UNREACHABLE
        assert "certificate" in error.message.lower()

    @pytest.mark.slow
    async def test_a_client_of_another_authority(self, tls_etcd: EtcdCluster, tmp_path: Path) -> None:
        assert tls_etcd.tls_files is not None
        foreign = issue_tls(tmp_path)
        error = await _refused(tls_etcd, tls=TlsFiles(ca=tls_etcd.tls_files.ca, cert=foreign.cert, key=foreign.key))
        assert error.code is ErrorCode.UNREACHABLE

    @pytest.mark.slow
    async def test_files_that_are_replaced_count_from_the_next_call_on(
        self, tls_etcd: EtcdCluster, prefix: str, tmp_path: Path
    ) -> None:
        good = tls_etcd.tls_files
        assert good is not None
        own = TlsFiles(ca=good.ca, cert=tmp_path / "cert.pem", key=tmp_path / "key.pem")

        def put(files: TlsFiles) -> None:
            own.cert.write_bytes(files.cert.read_bytes())
            own.key.write_bytes(files.key.read_bytes())

        put(good)
        async with opened_etcd(tls_etcd.endpoints, tls=own, call_timeout_s=1.5) as store:
            assert await store.get(prefix + "k") is None
            put(issue_tls(tmp_path / "foreign"))
            with pytest.raises(HoldfastError) as caught:
                await store.get(prefix + "k")
            assert caught.value.code is ErrorCode.UNREACHABLE
            put(good)
            assert await store.get(prefix + "k") is None

    @pytest.mark.slow
    async def test_plain_text(self, tls_etcd: EtcdCluster) -> None:
        assert (await _refused(tls_etcd, tls=None)).code is ErrorCode.UNREACHABLE

    async def test_a_certificate_file_that_is_missing(self, tls_etcd: EtcdCluster, tmp_path: Path) -> None:
        assert tls_etcd.tls_files is not None
        error = await _refused(
            tls_etcd, tls=TlsFiles(ca=tmp_path / "none", cert=tls_etcd.tls_files.cert, key=tls_etcd.tls_files.key)
        )
        assert error.code is ErrorCode.INVALID_ARGUMENT


class TestLogin:
    @pytest.mark.slow
    async def test_a_session_outlives_its_tokens(self, login_etcd: EtcdCluster, prefix: str) -> None:
        """Tokens expire, every token is lost with a restart, and each change of the accounts makes them stale."""
        key = f"mine/{prefix}k"
        async with (
            opened_etcd(login_etcd.endpoints, user="user", password="secret") as store,
            contextlib.aclosing(store.watch(f"mine/{prefix}")) as batches,
        ):
            assert (await anext(batches)).relisted
            for invalidate in (self._expire, self._restart, self._change_accounts):
                await asyncio.to_thread(invalidate, login_etcd)
                written = await store.txn([], [Put(key, b"")])
                assert written.succeeded
                async with asyncio.timeout(_SOON_S):
                    batch = await anext(batches)
                assert (batch.revision, batch.relisted) == (written.revision, False)
                assert (await store.txn([Exists(key)], [])).succeeded

    @staticmethod
    def _expire(cluster: EtcdCluster) -> None:
        # Nothing can be asked that tells: an unused token lives for its term and up to a second more.
        expired_s = time.monotonic() + 2.5
        wait_until(lambda: time.monotonic() > expired_s, "expired tokens")

    @staticmethod
    def _restart(cluster: EtcdCluster) -> None:
        cluster.kill(0)
        cluster.restart(0)
        cluster.wait_healthy()

    @staticmethod
    def _change_accounts(cluster: EtcdCluster) -> None:
        cluster.ctl("role", "add", "another", user="root:rootpw")

    @pytest.mark.parametrize(("user", "password"), [("user", "wrong"), ("nobody", "secret"), ("", "")])
    async def test_a_wrong_login(self, login_etcd: EtcdCluster, user: str, password: str) -> None:
        with pytest.raises(HoldfastError) as caught:
            await EtcdStore.open(login_etcd.endpoints, user=user, password=password)
        assert caught.value.code is ErrorCode.DENIED
        assert "secret" not in str(caught.value)

    async def test_keys_of_others(self, login_etcd: EtcdCluster) -> None:
        async with opened_etcd(login_etcd.endpoints, user="user", password="secret") as store:
            for call in (
                store.get("theirs/k"),
                store.snapshot(["mine/", "theirs/"]),
                store.txn([], [Put("theirs/k", b"")]),
                anext(store.watch("theirs/")),
            ):
                with pytest.raises(HoldfastError) as caught:
                    await call
                assert caught.value.code is ErrorCode.DENIED

    async def test_a_login_that_nobody_asks_for(self, one_etcd: EtcdCluster, prefix: str) -> None:
        async with opened_etcd(one_etcd.endpoints, user="user", password="secret") as store:
            assert await store.get(prefix + "k") is None

    def test_a_password_is_not_shown(self) -> None:
        assert "secret" not in repr(Login("user", "secret"))
