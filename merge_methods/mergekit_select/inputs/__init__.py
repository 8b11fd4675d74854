"""What is there? Recipes, references, files, checkpoints, hub models and adapters, described without reading a tensor.

Readers return what they read or raise one of this package's errors; they report nothing and compute nothing.
"""
