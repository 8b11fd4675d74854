"""What the tests of ``verify`` share: what small outputs hold, and what an answer says."""

from __future__ import annotations

from click.testing import Result

from mergekit_select.verification import Verification
from tests.support.commands import one_line

TENSORS, PARAMETERS = 21, 19_616  # of a merge of small_family()


def kinds(answer: Verification) -> set[str]:
    """The kinds of differences and problems."""
    return {difference.kind for difference in answer.differences} | {kind for kind, _, _ in problems(answer)}


def problems(answer: Verification) -> list[tuple[str, str, str]]:
    """Kind, place and text of each problem."""
    return [(problem.kind, problem.place, problem.text) for problem in answer.problems]


def refused(result: Result, text: str) -> None:
    """Assert that the command said in one line what it cannot read."""
    one_line(result, 2, text)
    assert result.output.startswith("Error: ")
