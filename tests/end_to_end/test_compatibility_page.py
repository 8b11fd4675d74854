"""docs/compatibility.md has the rows that the tests behind it have, and no others."""

from __future__ import annotations

from tests import compatibility


def test_the_page_is_what_the_tests_show() -> None:
    """Written anew with `python -m tests.compatibility`; here its lines are compared with the tests' own."""
    on_page = compatibility.lines_on(compatibility.PAGE.read_text(encoding="utf-8"))
    assert on_page == compatibility.lines_on(compatibility.page(compatibility.rows()))
    assert all(len(lines) > 2 for lines in on_page.values())


def test_a_failure_or_a_missing_row_shows_on_the_page() -> None:
    rows = compatibility.rows()
    right = compatibility.lines_on(compatibility.page(rows))
    assert compatibility.lines_on(compatibility.page(rows[:-1])) != right
    assert compatibility.lines_on(compatibility.page([*rows, rows[0]._replace(result=compatibility.FAILS)])) != right
