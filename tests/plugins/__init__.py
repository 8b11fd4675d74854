"""Tests: The startup files, and merge methods of other distributions."""
