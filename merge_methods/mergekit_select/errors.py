"""The errors that mergekit-select raises itself; what mergekit reports is left to mergekit."""

from __future__ import annotations


class MergekitSelectError(Exception):
    """Base of every error raised by mergekit-select.

    It is no ``ValueError``, since pydantic would bury the text of one under its own.
    """


class ParameterError(MergekitSelectError):
    """A recipe parameter, or an argument of the Python interface, breaks its rule."""


class TensorError(MergekitSelectError):
    """The tensors given for one output cannot be selected from as they are."""


class UnsupportedDtypeError(TensorError, TypeError):
    """A tensor's dtype is none that selection copies."""
