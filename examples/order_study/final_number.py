"""The number that an answer in words comes to."""

import re
from decimal import Decimal

MARK = "####"  # stands before the final number in GSM8K's answers

_NUMBER = re.compile(
    # A minus is a sign only where it joins nothing: 10-3 ends with 3, and so does a 5-3 win.
    r"(?P<sign>(?<![\w)])[-\u2212])?(?:\$\s?(?P<inner>[-\u2212])?)?"
    # Commas belong to a number where they cut it into thousands: 1,234 is one number, 1,2 are two.
    r"(?P<value>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![\w.])\.[0-9]+)"
)


def final_number(text: str) -> Decimal | None:
    """The number after the first `####` of a text, or its last number where it has no such mark.

    The first mark counts, since a model that does not stop after its answer goes on with another question.
    Equal numbers are equal however they are written: 72, $72, 72.0 and `72.` at the end of a sentence.
    """
    before, mark, after = text.partition(MARK)
    numbers = list(_NUMBER.finditer(after.split("\n")[0] if mark else before))
    if not numbers:
        return None
    match = numbers[0] if mark else numbers[-1]
    value = Decimal(match["value"].replace(",", ""))
    return -value if match["sign"] or match["inner"] else value
