"""One sample as text: a prompt, and the response that a model learns to give."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """A prompt, empty where plain text is learnt, and its response."""

    prompt: str
    response: str


def digest(examples: Iterable[Example]) -> str:
    """SHA-256 of examples and their order."""
    total = hashlib.sha256()
    for example in examples:
        for part in (example.prompt, example.response):
            total.update(hashlib.sha256(part.encode("utf-8", "surrogatepass")).digest())
    return total.hexdigest()
