"""How long a collection of a million blocks takes, and how much memory: `python -m benchmarks.collection`."""
