"""Sets of files: patterns of paths, the rules that every entry keeps, and the form in which a set is stored."""
