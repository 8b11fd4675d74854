"""Hostile input: mutated recipes, headers, indexes, configs, tokenizers and outputs, and merges under faults."""
