"""A whole cluster in one thread on virtual time, from one seed: the product's own code, a simulated world around it.

`loop` runs it, `network`, `metadata` and `disk` are its world, `nodes`, `coordinators` and `clients` put the product's
parts into it, `faults` breaks things within what the product promises to survive, and `checker` watches with a god's
view. `history` makes all of that from a seed; `python -m tests.sim` runs many of them.
"""
