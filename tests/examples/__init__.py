"""Tests: the examples."""
