"""Every item of the wire contract says what it means, and the services are the ones that are named."""

from __future__ import annotations

from tests.meta import checks
from tests.meta.tree import text_of, tracked


def test_every_proto_item_has_a_comment() -> None:
    protos = [path for path in tracked() if path.suffix == ".proto"]
    assert protos
    assert not [f"{path}:{each}" for path in protos for each in checks.uncommented_proto_items(text_of(path))]
