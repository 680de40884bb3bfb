"""The coordinator: recovery points, layout, membership, access. No data block passes through it."""
