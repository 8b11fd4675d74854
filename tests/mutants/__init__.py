"""Mutation testing: how many small faults put into the code are found by the tests."""
