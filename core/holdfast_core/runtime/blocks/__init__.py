"""The way to blocks on storage nodes: connections, reading with failover, presence. Shared by SDK and coordinator."""
