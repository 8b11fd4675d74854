"""Do it: a merge in parts that are computed side by side, in any order and on any machine, and never twice.

Importing this room imports neither torch nor mergekit, so that processes can be started before these are loaded.
"""
