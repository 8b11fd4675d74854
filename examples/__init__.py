"""Programs that use the merge methods; each runs from the root of a clone, as `python -m examples.NAME`."""
