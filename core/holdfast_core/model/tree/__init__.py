"""Index trees: what a volume or a stored object consists of (DESIGN section 4, docs/formats.md).

`nodes` is their form in bytes, `build` makes them bottom up; `walk`, `changed`, `objects` and `diff` read them. Nothing
here fetches or opens: builders hand nodes to a function that stores them, walks say what they want and are fed
plaintexts.
"""

from holdfast_core.model.tree.build import ObjectTreeBuilder, VolumeTreeBuilder
from holdfast_core.model.tree.changed import ChangedWalk, Place
from holdfast_core.model.tree.diff import DiffWalk, NewReferences, ObjectScan
from holdfast_core.model.tree.nodes import (
    Node,
    ObjectInner,
    ObjectLeaf,
    VolumeInner,
    VolumeLeaf,
    decode_node,
    encode_node,
)
from holdfast_core.model.tree.objects import ObjectLeafRef, ObjectWalk, decode_object_leaf
from holdfast_core.model.tree.roots import RootScan
from holdfast_core.model.tree.shape import tree_height, volume_height
from holdfast_core.model.tree.walk import (
    VolumeWalk,
    decode_volume_leaf,
)

__all__ = [
    "ChangedWalk",
    "DiffWalk",
    "NewReferences",
    "Node",
    "ObjectInner",
    "ObjectLeaf",
    "ObjectLeafRef",
    "ObjectScan",
    "ObjectTreeBuilder",
    "ObjectWalk",
    "Place",
    "RootScan",
    "VolumeInner",
    "VolumeLeaf",
    "VolumeTreeBuilder",
    "VolumeWalk",
    "decode_node",
    "decode_object_leaf",
    "decode_volume_leaf",
    "encode_node",
    "tree_height",
    "volume_height",
]
