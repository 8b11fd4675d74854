"""Parameter selection and resampling as merge methods for mergekit."""

__version__ = "0.1.0"
