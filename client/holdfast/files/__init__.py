"""Files by name: sets of files as stored objects, from directories and from file systems inside recovery points."""
