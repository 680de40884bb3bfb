"""`holdfast demo`: the whole job once, on this machine, with real files."""
