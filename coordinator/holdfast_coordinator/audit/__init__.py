"""The audit log: the ledger that appends to it, its reading, its sealing into the cluster, its service."""
