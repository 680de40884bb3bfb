"""The coordinator: recovery points, layout, membership, access. No data block passes through it.

`coordinator` puts the parts together, `state_service` and `cluster_service` are the gRPC shells around them. Several
coordinators serve one cluster at once: all truth is in the metadata store, and what a coordinator remembers is either
fixed for good or compared by revision before anything depends on it.
"""
