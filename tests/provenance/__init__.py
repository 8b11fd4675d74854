"""Tests of locks, records, `reproduce` and `publish`, against a hub on this machine."""
