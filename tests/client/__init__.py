"""Tests of the SDK and of the way to blocks, against the real services in memory and on disk."""
