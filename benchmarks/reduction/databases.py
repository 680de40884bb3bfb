"""Two real database engines, written to as an application does: SQLite in place, LMDB by copying pages.

Each keeps accounts: a change looks one up at random and writes its balance, its time and its state; each transaction
also adds an entry to a journal. The pages are the engine's own.
"""

from __future__ import annotations

import json
import random
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, Protocol

import lmdb

MIB: Final = 1024 * 1024
_STATES: Final = ("active", "frozen", "closed", "in review", "new")
_ROW_BYTES: Final = 440
_FILLER_BYTES: Final = 6 * MIB


class Database(Protocol):
    """A database in a folder."""

    name: str

    def files(self) -> dict[str, Path]:
        """Its files, by the names that they have on the disk. Nobody writes to them meanwhile."""
        ...

    def work(self, transactions: int) -> None:
        """Commit so many transactions."""
        ...

    def close(self) -> None:
        """Close it."""
        ...


class Accounts:
    """Draws rows whose text comes from `words`, and changes to them."""

    def __init__(self, dice: random.Random, words: Sequence[str]) -> None:
        """Draw from `dice`."""
        self._dice = dice
        self._words = words

    def row(self) -> tuple[str, str, int, str, int, str, str]:
        """Return owner, address, balance, state, time, a secret, a note; 440 bytes or so."""
        dice = self._dice
        owner = f"{dice.choice(self._words)} {dice.choice(self._words)}"
        note = " ".join(dice.choice(self._words) for _ in range(20))
        address = f"{owner.replace(' ', '.')}.{dice.randrange(10_000)}@example.org"
        return owner, address, *self.change(), f"{dice.getrandbits(256):064x}", note

    def change(self) -> tuple[int, str, int]:
        """Return balance, state and time."""
        dice = self._dice
        return dice.randrange(10**9), dice.choice(_STATES), 1_795_000_000_000 + dice.randrange(10**9)

    def picks(self, count: int) -> Iterator[int]:
        """Yield two accounts for a transaction, both at random."""
        yield from (self._dice.randrange(count), self._dice.randrange(count))


class SqliteBank:
    """SQLite with a write-ahead log and an index on what changes; the log lies on the disk beside the database."""

    name: str = "SQLite"

    def __init__(self, folder: Path, size_bytes: int, accounts: Accounts) -> None:
        """Fill a database of at least `size_bytes`."""
        folder.mkdir()
        self._accounts = accounts
        self._path = folder / "bank.db"
        self._count = size_bytes // _ROW_BYTES
        self._base = sqlite3.connect(self._path, isolation_level=None)
        run = self._base.execute
        run("PRAGMA page_size = 4096")
        run("PRAGMA journal_mode = OFF")
        run("PRAGMA synchronous = OFF")
        run(
            "CREATE TABLE account (id INTEGER PRIMARY KEY, owner TEXT, address TEXT, balance INTEGER, state TEXT,"
            " changed_ms INTEGER, secret TEXT, note TEXT)"
        )
        run("CREATE TABLE entry (id INTEGER PRIMARY KEY, account INTEGER, changed_ms INTEGER, body TEXT)")
        run("CREATE TABLE filler (body BLOB)")
        run("BEGIN")
        self._base.executemany(
            "INSERT INTO account VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            ((number, *accounts.row()) for number in range(self._count)),
        )
        run("INSERT INTO filler VALUES (randomblob(?))", (_FILLER_BYTES,))
        run("CREATE INDEX changed ON account (changed_ms)")
        run("COMMIT")
        # Pages that are free, as deleted rows leave them: the journal of a working database grows into such.
        run("DROP TABLE filler")
        run("PRAGMA journal_mode = WAL")

    def files(self) -> dict[str, Path]:
        """Return the database and its write-ahead log."""
        return {path.name: path for path in (self._path, self._path.with_name("bank.db-wal"))}

    def work(self, transactions: int) -> None:
        """Commit transactions of two accounts each, with an entry in the journal."""
        run = self._base.execute
        for _ in range(transactions):
            run("BEGIN IMMEDIATE")
            for account in self._accounts.picks(self._count):
                balance, state, changed_ms = self._accounts.change()
                run(
                    "UPDATE account SET balance = ?, state = ?, changed_ms = ? WHERE id = ?",
                    (balance, state, changed_ms, account),
                )
                body = json.dumps({"account": account, "balance": balance, "state": state})
                run("INSERT INTO entry (account, changed_ms, body) VALUES (?, ?, ?)", (account, changed_ms, body))
            run("COMMIT")

    def close(self) -> None:
        """Close the connection."""
        self._base.close()


class LmdbBank:
    """LMDB: a changed page is written to a free one, so even a small change moves a page and those above it."""

    name: str = "LMDB"

    def __init__(self, folder: Path, size_bytes: int, accounts: Accounts) -> None:
        """Fill an environment of at least `size_bytes`."""
        folder.mkdir()
        self._accounts = accounts
        self._count = size_bytes // _ROW_BYTES
        self._folder = folder
        self._next_entry = 0
        self._base = lmdb.open(str(folder), map_size=4 * size_bytes, max_dbs=2, sync=False, lock=False)
        self._account, self._entry = (self._base.open_db(name) for name in (b"account", b"entry"))
        with self._base.begin(write=True) as transaction:
            for number in range(self._count):
                key = number.to_bytes(8, "big")
                transaction.put(key, json.dumps(accounts.row()).encode(), db=self._account, append=True)
            for number in range(_FILLER_BYTES // 4096):
                transaction.put(b"\xff" + number.to_bytes(8, "big"), bytes(4000), db=self._entry)
        with self._base.begin(write=True) as transaction:
            for number in range(_FILLER_BYTES // 4096):
                transaction.delete(b"\xff" + number.to_bytes(8, "big"), db=self._entry)

    def files(self) -> dict[str, Path]:
        """Return the data file; the lock file holds nothing."""
        self._base.sync(True)
        return {"data.mdb": self._folder / "data.mdb"}

    def work(self, transactions: int) -> None:
        """Commit transactions of two accounts each, with an entry in the journal."""
        for _ in range(transactions):
            with self._base.begin(write=True) as transaction:
                for account in self._accounts.picks(self._count):
                    key = account.to_bytes(8, "big")
                    row = json.loads(bytes(transaction.get(key, db=self._account) or b"null"))
                    row[2:5] = self._accounts.change()
                    transaction.put(key, json.dumps(row).encode(), db=self._account)
                    body = json.dumps({"account": account, "balance": row[2], "state": row[3]}).encode()
                    transaction.put(self._next_entry.to_bytes(8, "big"), body, db=self._entry, append=True)
                    self._next_entry += 1

    def close(self) -> None:
        """Close the environment."""
        self._base.close()
