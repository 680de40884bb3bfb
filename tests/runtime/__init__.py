"""Tests of the runtime over real loopback servers."""
