"""The storage node: keeps sealed blocks, verifies every hash on write and on read, holds no keys."""
