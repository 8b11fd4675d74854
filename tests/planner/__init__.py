"""Tests: What mergekit would do, and what planning must leave alone."""
