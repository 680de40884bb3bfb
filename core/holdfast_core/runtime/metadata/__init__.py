"""The metadata store: one small interface, and two engines that pass one contract suite.

`store` is the interface with its values, `checks` the rules both engines share, `sqlite` the embedded engine for one
machine, `etcd` (on `etcd_client`) the one for clusters. Only coordinators open a store (DESIGN section 7).
"""
