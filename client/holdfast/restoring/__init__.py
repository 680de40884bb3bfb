"""Restoring a recovery point: whole, verified, then under its name; as raw or qcow2, or over an older local copy."""
