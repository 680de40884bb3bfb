"""What a VM carries through its life beside its volumes: labels, a definition, and what to keep of it. Pure.

These are judged here for both ends: the SDK refuses early, the coordinator refuses whoever does not.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

from blake3 import blake3

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.files.patterns import select
from holdfast_core.model.limits import (
    DEFINITION_BYTES_MAX,
    KEEP_PATTERN_CHARS_MAX,
    KEEP_RULES_BYTES_MAX,
    KEEP_RULES_MAX,
    LABEL_NAME_CHARS_MAX,
    LABEL_VALUE_CHARS_MAX,
    LABELS_BYTES_MAX,
    LABELS_MAX,
    PARTITION_NUMBER_MAX,
)
from holdfast_core.model.names import check_name, check_volume_name
from holdfast_proto.v1.records_pb2 import KeepRule, Label

KEEP_DIGEST_BYTES: Final = 32

# A restore writes the definition beside NAME.raw, NAME.qcow2, what is not whole yet, and its own description.
_TAKEN_ENDINGS: Final = (".raw", ".qcow2", ".partial")
_TAKEN_NAMES: Final = frozenset({"vm.json"})


def keep_digest(rule: KeepRule) -> bytes:
    """Return the 32 bytes that stand for a keep rule: BLAKE3 of its serialised form.

    An object that says that it fulfils the rule names them, so that a rule that was changed since is not fulfilled.
    """
    return blake3(rule.SerializeToString(deterministic=True)).digest()


def checked_labels(labels: Sequence[Label]) -> list[Label]:
    """Return labels by name.

    Raises:
        HoldfastError: INVALID_ARGUMENT for a name or value that is not allowed, or a name that comes twice;
            LIMIT_EXCEEDED for too many of them, or too much in all.
    """
    if len(labels) > LABELS_MAX:
        raise HoldfastError(ErrorCode.LIMIT_EXCEEDED, f"the VM has {len(labels)} labels; {LABELS_MAX} are allowed")
    found: dict[str, Label] = {}
    for label in labels:
        check_name(label.name, "label name", chars_max=LABEL_NAME_CHARS_MAX)
        if label.name in found:
            raise _refused(f"the label {label.name} is given twice")
        if len(label.value) > LABEL_VALUE_CHARS_MAX or not (label.value.isprintable() or not label.value):
            raise _refused(
                f"the value of the label {label.name} is not allowed; use at most {LABEL_VALUE_CHARS_MAX} printable "
                "characters"
            )
        found[label.name] = Label(name=label.name, value=label.value)
    total = sum(len(label.name.encode()) + len(label.value.encode()) for label in labels)
    if total > LABELS_BYTES_MAX:
        raise HoldfastError(
            ErrorCode.LIMIT_EXCEEDED, f"the VM's labels take {total} bytes; {LABELS_BYTES_MAX} are allowed"
        )
    return sorted(found.values(), key=lambda label: label.name)


def check_definition(definition: bytes, name: str) -> None:
    """Check a VM's definition and the file name that it is restored under; both empty means none.

    Raises:
        HoldfastError: INVALID_ARGUMENT for one without the other, or a name that is not a plain file's or is taken;
            LIMIT_EXCEEDED for a definition that is too long.
    """
    if bool(definition) != bool(name):
        raise _refused("a definition and its file name come together; give both or neither")
    if not name:
        return
    check_name(name, "definition's file name")
    folded = name.casefold()
    if folded.endswith(_TAKEN_ENDINGS) or folded in _TAKEN_NAMES:
        raise _refused(
            f"the definition's file name {name!r} is one that a restore writes itself; choose one that is not vm.json "
            f"and does not end in {', '.join(_TAKEN_ENDINGS)}"
        )
    if len(definition) > DEFINITION_BYTES_MAX:
        raise HoldfastError(
            ErrorCode.LIMIT_EXCEEDED,
            f"the definition has {len(definition)} bytes; {DEFINITION_BYTES_MAX} are allowed",
        )


def checked_keep(rules: Sequence[KeepRule], volumes: Collection[str]) -> list[KeepRule]:
    """Return keep rules by name; `volumes` are the names of the VM's volumes.

    Raises:
        HoldfastError: INVALID_ARGUMENT for a rule that names nothing, another volume, or a pattern that is not allowed,
            or whose name comes twice; LIMIT_EXCEEDED for too many of them, or too much in all.
    """
    if len(rules) > KEEP_RULES_MAX:
        raise HoldfastError(ErrorCode.LIMIT_EXCEEDED, f"the VM has {len(rules)} keep rules; {KEEP_RULES_MAX} at most")
    if len({rule.name for rule in rules}) != len(rules):
        raise _refused("two keep rules have one name")
    for rule in rules:
        _check_rule(rule, volumes)
    total = sum(rule.ByteSize() for rule in rules)
    if total > KEEP_RULES_BYTES_MAX:
        raise HoldfastError(
            ErrorCode.LIMIT_EXCEEDED, f"the keep rules take {total} bytes; {KEEP_RULES_BYTES_MAX} are allowed"
        )
    return sorted(map(_plain, rules), key=lambda rule: rule.name)


def _check_rule(rule: KeepRule, volumes: Collection[str]) -> None:
    check_name(rule.name, "keep rule's name")
    check_name(rule.task_id, "task name")
    check_volume_name(rule.volume)
    if rule.volume not in volumes:
        raise _refused(f"the keep rule {rule.name} is about the volume {rule.volume}, which the VM does not have")
    if rule.partition > PARTITION_NUMBER_MAX:
        raise _refused(f"the keep rule {rule.name} names partition {rule.partition}; {PARTITION_NUMBER_MAX} at most")
    if not rule.include:
        raise _refused(f"the keep rule {rule.name} includes nothing; give at least one pattern, '**' for everything")
    for pattern in (*rule.include, *rule.exclude):
        if not pattern or "\0" in pattern or len(pattern) > KEEP_PATTERN_CHARS_MAX:
            raise _refused(
                f"a pattern of the keep rule {rule.name} is not allowed; it has 1 to {KEEP_PATTERN_CHARS_MAX} "
                "characters and no NUL"
            )
    # Whether they can be read as patterns; what they match is asked much later, when it would be too late to say no.
    select(rule.include, rule.exclude)


def _plain(rule: KeepRule) -> KeepRule:
    """Return the rule without fields that this version does not know, so that its digest is of what was checked."""
    plain = KeepRule()
    plain.CopyFrom(rule)
    plain.DiscardUnknownFields()
    return plain


def _refused(message: str) -> HoldfastError:
    return HoldfastError(ErrorCode.INVALID_ARGUMENT, message)
