"""The calls of the managers, a file a group: asynchronous, and the blocking face of the same."""
