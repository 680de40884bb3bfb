"""The reduction report: how many bytes Holdfast does not keep, row by row of what the project set out to save."""
