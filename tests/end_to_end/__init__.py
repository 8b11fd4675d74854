"""Tests through mergekit's own commands, from the files' bytes to the files' bytes."""
