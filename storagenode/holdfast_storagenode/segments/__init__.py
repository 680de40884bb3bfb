"""The append-only segment engine: durable records in large files, and an index that can always be rebuilt from them."""
