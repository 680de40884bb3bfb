"""How a node comes to hold what it has to, and lets go of what it has not: docs/healing.md."""
