"""Version 1 of Holdfast's messages and services."""
