"""Checking points and application data without restoring them; one of them, or all that a tenant has."""
