"""Tests: which bits are selected."""
