"""The text every CPython carries, `pydoc_data.topics`, cut into passages and split into disjoint parts.

Topics repeat one another: the chapter on compound statements holds the text of `if`, `for` and `while`. So

1. paragraphs are taken from the longest topic first, and one that has occurred before is left out;
2. the remaining paragraphs of a topic, in their order, are joined into passages of limited length;
3. passages that share a run of eight words form a group, and a group goes into one part as a whole.

So no run of eight words occurs in two parts. Passages of one topic do fall into different parts: the held-out
text is new to every model, yet of the kind they were trained on.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from pydoc_data import topics as pydoc_topics

from order_study.settings import Part
from order_study.sources import Text

SHARED_WORDS = 8


def split(settings: Text) -> dict[Part, list[str]]:
    """Split the text into base, fine-tuning and held-out passages, each in the order of the source.

    The part of a group depends on nothing but its first passage, so that a paragraph that changes with the
    version of Python moves little else.
    """
    passages = cut(pydoc_topics.topics, settings)
    parts: dict[Part, list[str]] = {"base": [], "fine_tuning": [], "held_out": []}
    for group, passage in zip(groups(passages), passages, strict=True):
        parts[_part(passages[group], settings)].append(passage)
    return parts


def cut(topics: Mapping[str, str], settings: Text) -> list[str]:
    """Cut topics into passages of at most `passage_characters`, leaving out paragraphs that repeat others."""
    longest_first = sorted(topics, key=lambda name: (-len(topics[name]), name))
    seen: set[str] = set()
    passages: list[str] = []
    for name in longest_first[: settings.topics]:
        fresh = []
        for paragraph in paragraphs(topics[name]):
            normal = " ".join(paragraph.split())
            if normal not in seen:
                seen.add(normal)
                fresh.append(paragraph)
        passages += join(fresh, settings.passage_characters)
    return passages


def paragraphs(content: str) -> list[str]:
    """The paragraphs of a text: what stands between its empty lines."""
    return [paragraph for paragraph in re.split(r"\n\s*\n", content.strip("\n")) if paragraph.strip()]


def join(pieces: Iterable[str], limit: int) -> list[str]:
    """Join consecutive paragraphs up to `limit` characters; a longer one is cut between its lines."""
    passages: list[str] = []
    for paragraph in pieces:
        separator = "\n\n"
        for piece in [paragraph] if len(paragraph) <= limit else _lines(paragraph, limit):
            if passages and len(passages[-1]) + len(separator) + len(piece) <= limit:
                passages[-1] += separator + piece
            else:
                passages.append(piece)
            separator = "\n"
    return passages


def groups(passages: list[str]) -> list[int]:
    """For each passage, the index of the first passage of its group.

    Two passages are in one group if they share `SHARED_WORDS` consecutive words, or through others that do.
    """
    leader = list(range(len(passages)))

    def find(index: int) -> int:
        while leader[index] != index:
            index = leader[index]
        return index

    holder: dict[tuple[str, ...], int] = {}
    for index, passage in enumerate(passages):
        for run in runs(passage):
            one, other = find(holder.setdefault(run, index)), find(index)
            leader[max(one, other)] = min(one, other)
    return [find(index) for index in range(len(passages))]


def runs(passage: str) -> set[tuple[str, ...]]:
    """All runs of `SHARED_WORDS` consecutive words, in lower case; a shorter passage is one run."""
    words = re.findall(r"\w+", passage.lower())
    starts = range(max(1, len(words) - SHARED_WORDS + 1))
    return {tuple(words[start : start + SHARED_WORDS]) for start in starts}


def _lines(paragraph: str, limit: int) -> list[str]:
    lines = paragraph.split("\n")
    return [line[start : start + limit] for line in lines for start in range(0, max(1, len(line)), limit)]


def _part(passage: str, settings: Text) -> Part:
    position = int.from_bytes(hashlib.sha256(passage.encode()).digest()[:8], "big") / 2**64
    if position < settings.base:
        return "base"
    return "held_out" if position >= 1 - settings.held_out else "fine_tuning"
