"""What lies on disk: where, made from what, and whether it is whole."""
