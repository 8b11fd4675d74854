"""Tests: ``check``."""
