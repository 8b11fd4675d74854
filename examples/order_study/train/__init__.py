"""The models that are trained: the base, and the sub-models, each resumable."""
