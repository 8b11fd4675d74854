"""The error this program raises for what its user can mend; the command line prints it as one line."""


class StudyError(Exception):
    """A rule was broken: the message names the rule, the place, the value and the remedy."""
