"""The benchmark behind `make bench`: Holdfast beside restic and borg on one real disk image, in one run."""
