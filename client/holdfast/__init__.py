"""Holdfast keeps the state of stateless VMs: the SDK."""
