"""Tests: ``verify``."""
