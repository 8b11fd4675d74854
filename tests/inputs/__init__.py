"""Tests: What is read of models and recipes."""
