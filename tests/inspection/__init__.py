"""Tests: ``inspect``."""
