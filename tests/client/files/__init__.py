"""Sets of files, directories and file systems in images."""
