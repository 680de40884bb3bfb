"""What grows with blocks, points, nodes and tenants: `python -m benchmarks.scaling`."""
