"""Golden files: the bytes of every format, so that a change of bytes is seen."""
