"""``python -m mergekit_select.cli``: the command where its script is not on the path."""

from mergekit_select.cli import main

main()
