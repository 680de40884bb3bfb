"""What a put, a stamp, a delete and a quarantine come to: decided in the committer's order, written by the committer.

Everything is decided under the committer's lock, against the table and against what was decided before and is not
durable yet. So a delete counts the stamps that are on their way, and what comes after a delete finds nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeAlias

from holdfast_core.model.block import block_id as hash_of
from holdfast_storagenode.segments.committer import GroupCommitter, PendingRecord, Ticket
from holdfast_storagenode.segments.epochs import Epochs, check_epoch
from holdfast_storagenode.segments.index import Entry, make_key, make_keys, split_key
from holdfast_storagenode.segments.reading import Wanted
from holdfast_storagenode.segments.record import STAMPED_IDS_MAX, RecordHeader, RecordType
from holdfast_storagenode.segments.space import Space
from holdfast_storagenode.store import PartitionOf, Sealed, Verdict, kind_of

Lookup: TypeAlias = Callable[[Sequence[bytes]], list[Entry | None]]


@dataclass(slots=True)
class _Plan:
    """What one call comes to: its batch, the records of blocks by key, the keys to stamp in the order met."""

    stamp: int = 0
    ticket: Ticket = field(default_factory=Ticket)
    fresh: dict[bytes, PendingRecord] = field(default_factory=dict)
    stamped: dict[bytes, None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decider:
    """Everything that decisions depend on. `lookup` asks the table."""

    committer: GroupCommitter
    epochs: Epochs
    space: Space
    lookup: Lookup
    partition_of: PartitionOf

    def put(self, tenant: int, blocks: Sequence[Sealed], *, stamp: int) -> Future[list[Verdict]]:
        """Keep blocks. A present copy that is known to be corrupt is replaced.

        Raises:
            HoldfastError: DISK_FULL; INTERNAL if the disk failed.
        """
        check_epoch(stamp)
        keys = make_keys(tenant, self.partition_of, [block.id for block in blocks])
        plan = _Plan(stamp)
        committer, fresh, verdicts = self.committer, plan.fresh, plan.ticket.verdicts
        with committer.lock:
            committer.check_writable()
            decided_of = committer.decided
            for block, key, entry in zip(blocks, keys, self.lookup(keys), strict=True):
                decided = fresh.get(key) or decided_of(key)
                born = stamp
                if entry is not None or decided is not None:
                    if _is_there(decided, entry):
                        self._find(plan, key, decided, entry)
                        verdicts.append(Verdict.PRESENT)
                        continue
                    if decided is None or decided.header.type is not RecordType.TOMBSTONE:
                        # A copy that is set aside hands its stamp on.
                        born = max(stamp, self._stamp_of(key, decided, entry))
                header = RecordHeader(RecordType.BLOCK, tenant, block.id, kind_of(block.data), len(block.data), born)
                fresh[key] = PendingRecord(key, header, block.data)
                verdicts.append(Verdict.OK)
            self._take(plan, tenant)
            if fresh:
                self.space.check(
                    plan.ticket.size_bytes,
                    used_bytes=sum(committer.sizes.values()),
                    queued_bytes=committer.queued_bytes,
                )
            self._enqueue(plan.ticket)
        return plan.ticket.done

    def stamp(
        self, tenant: int, ids: Sequence[bytes], verdicts: Sequence[Verdict], *, stamp: int
    ) -> Future[list[Verdict]]:
        """Stamp those of `ids` that were found whole and are still; answer `verdicts` as they are then.

        Raises:
            HoldfastError: DISK_FULL; INTERNAL if the disk failed.
        """
        check_epoch(stamp)
        keys = make_keys(tenant, self.partition_of, ids)
        plan = _Plan(stamp)
        with self.committer.lock:
            entries = self.lookup(keys)
            if self._is_stamped(keys, verdicts, entries, stamp):
                plan.ticket.done.set_result(list(verdicts))
                return plan.ticket.done
            for key, verdict, entry in zip(keys, verdicts, entries, strict=True):
                decided = self.committer.decided(key)
                found = verdict
                if verdict is Verdict.OK and _is_there(decided, entry):
                    self._find(plan, key, decided, entry)
                elif verdict is Verdict.OK:
                    gone = decided.header.type is RecordType.TOMBSTONE if decided is not None else entry is None
                    found = Verdict.MISSING if gone else Verdict.CORRUPT
                plan.ticket.verdicts.append(found)
            if plan.stamped:
                self.committer.check_writable()
            # Like tombstones, stamps may dip into the reserve: what is held must not be lost for want of space.
            self._take(plan, tenant)
            self._enqueue(plan.ticket)
        return plan.ticket.done

    def delete(self, tenant: int, ids: Sequence[bytes], *, cutoff: int | None) -> Future[list[Verdict]]:
        """Remove blocks. Tombstones may dip into the reserve: they are what frees space.

        Raises:
            HoldfastError: CONFLICT, NOT_READY as `Epochs.see`; INTERNAL if the disk failed.
        """
        keys = make_keys(tenant, self.partition_of, ids)
        plan = _Plan()
        fresh, verdicts = plan.fresh, plan.ticket.verdicts
        with self.committer.lock:
            self.committer.check_writable()
            if cutoff is not None:
                self.epochs.see(tenant, cutoff)
            for block_id, key, entry in zip(ids, keys, self.lookup(keys), strict=True):
                decided = fresh.get(key) or self.committer.decided(key)
                gone = entry is None if decided is None else decided.header.type is RecordType.TOMBSTONE
                if gone:
                    verdicts.append(Verdict.MISSING)
                    if decided is not None and key not in fresh:
                        plan.ticket.builds_on.append(decided)
                elif cutoff is not None and self._counted(key, decided, entry) >= cutoff:
                    verdicts.append(Verdict.KEPT)
                else:
                    verdicts.append(Verdict.OK)
                    fresh[key] = PendingRecord(key, RecordHeader(RecordType.TOMBSTONE, tenant, block_id))
            self._take(plan, tenant)
            self._enqueue(plan.ticket)
        return plan.ticket.done

    def quarantine(self, tenant: int, item: Wanted) -> bool:
        """Mark a copy as corrupt, unless that is being done or another copy took its place; return whether it was.

        Raises:
            HoldfastError: NOT_READY once the store is closing.
        """
        key = make_key(tenant, self.partition_of(item.block_id), item.block_id)
        place = item.entry
        ticket = Ticket()
        with self.committer.lock:
            (entry,) = self.lookup([key])
            same = entry is not None and (entry.segment, entry.offset) == (place.segment, place.offset)
            if entry is None or not same or entry.quarantined or self.committer.decided(key) is not None:
                return False
            if self.committer.failed:
                return False
            header = RecordHeader(
                RecordType.QUARANTINE,
                tenant,
                item.block_id,
                kind=place.kind,
                target_segment=place.segment,
                target_offset=place.offset,
            )
            ticket.take([PendingRecord(key, header)])
            self.committer.check_writable()
            self.committer.enqueue(ticket)
        # The caller's answer does not depend on the marker; until it is durable, every read finds the damage again.
        return True

    def _find(self, plan: _Plan, key: bytes, decided: PendingRecord | None, entry: Entry | None) -> None:
        """Answer for a block that is there: build on what is not durable yet, and stamp it where that is missing."""
        stamping = None if key in plan.fresh else self.committer.stamping(key)
        for record in (decided, stamping):
            if record is not None:
                plan.ticket.builds_on.append(record)
        if plan.stamp and self._counted(key, decided, entry) < plan.stamp:
            plan.stamped[key] = None

    def _is_stamped(
        self, keys: Sequence[bytes], verdicts: Sequence[Verdict], entries: Sequence[Entry | None], stamp: int
    ) -> bool:
        """Return whether all are whole, durable and have the stamp: what a commit finds of what was written for it.

        A higher stamp may be on its way: stamps never go back, so nobody has to wait for it.
        """
        needy = [entry for entry in entries if entry is None or entry.quarantined or entry.stamp < stamp]
        return not needy and all(verdict is Verdict.OK for verdict in verdicts) and not self.committer.decides_any(keys)

    def _stamp_of(self, key: bytes, decided: PendingRecord | None, entry: Entry | None) -> int:
        """Return a block's own stamp, as it will be once all that was decided is written."""
        stamping = self.committer.stamping(key)
        own = 0 if stamping is None else stamping.header.stamp
        if decided is not None and decided.header.type is RecordType.BLOCK:
            return max(own, decided.header.stamp)
        return own if entry is None else max(own, entry.stamp)

    def _counted(self, key: bytes, decided: PendingRecord | None, entry: Entry | None) -> int:
        return self.epochs.state.counted(key, self._stamp_of(key, decided, entry))

    def _take(self, plan: _Plan, tenant: int) -> None:
        """Put a plan's records into its batch."""
        plan.ticket.take(plan.fresh.values())
        keys = list(plan.stamped)
        records: list[PendingRecord] = []
        for at in range(0, len(keys), STAMPED_IDS_MAX):
            stamped = keys[at : at + STAMPED_IDS_MAX]
            packed = b"".join([split_key(key)[2] for key in stamped])
            header = RecordHeader(RecordType.STAMP, tenant, hash_of(packed), length=len(packed), stamp=plan.stamp)
            records.append(PendingRecord(b"", header, packed, stamped))
        plan.ticket.take_stamps(records)

    def _enqueue(self, ticket: Ticket) -> None:
        """Give a batch to the committer, or answer it where nothing has to become durable for it."""
        if ticket.records or ticket.stamps or ticket.builds_on:
            self.committer.enqueue(ticket)
        else:
            ticket.done.set_result(ticket.verdicts)


def _is_there(decided: PendingRecord | None, entry: Entry | None) -> bool:
    """Return whether a whole copy is there, or will be once what was decided is written."""
    if decided is not None:
        return decided.header.type is RecordType.BLOCK
    return entry is not None and not entry.quarantined
