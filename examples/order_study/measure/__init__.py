"""What is measured of the models on disk."""
