"""The command ``mergekit-select``, one module a command; all of them speak through ``_output``.

A command is imported when it is called, so that ``--help`` does not wait for torch.
"""

from mergekit_select.cli._main import main

__all__ = ["main"]
