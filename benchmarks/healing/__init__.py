"""How fast a cluster heals, and what its clients feel of it: `python -m benchmarks.healing`."""
