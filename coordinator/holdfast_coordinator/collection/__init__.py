"""Collection: deleting blocks that nothing visible and no open session reaches. docs/healing.md says why it is safe.

`epochs` numbers collections, `roots` reads what is marked from, `marking` walks trees, `spool` keeps marks, `planning`
compares marks with listings, `scanner` and `sweeping` list and delete on nodes, `collector` puts these together for one
collection, `running` sees to it that there is one at a time, `service` answers callers, `graph`, `explaining` and
`reclaimable` answer questions about trees.
"""
