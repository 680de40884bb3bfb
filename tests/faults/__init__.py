"""Faults on real processes: killed, paused, split, rotten, full and misled about the time; then healed and compared."""
