"""The order study: from one base to K sub-models that differ in the order of their training data alone."""
