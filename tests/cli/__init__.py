"""Tests of the `holdfast` command, against real clusters in processes of their own."""
