"""Tests of collection: its parts alone, and races of real parts in one process."""
