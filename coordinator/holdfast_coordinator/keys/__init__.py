"""Keys: the master key, what it wraps, signing keys, rotation, and the service for them."""
