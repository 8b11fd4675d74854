"""docs/cli.md shows every command's help (`python -m tests.cli.test_docs` writes it) and lists all findings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click

from mergekit_select.kinds import CATALOGUE
from tests.support.commands import script

DOCS = Path(__file__).parents[2] / "docs" / "cli.md"


def _commands(command: click.Command, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    context = click.Context(command, info_name=" ".join(path))
    yield path, command
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            if path[-1] != "run":  # the stock commands describe themselves
                inner = command.get_command(context, name)
                assert inner is not None
                yield from _commands(inner, (*path, name))


def _help_blocks() -> dict[str, str]:
    blocks = {}
    for path, command in _commands(script("mergekit-select"), ("mergekit-select",)):
        shown = click.Context(command, info_name=" ".join(path), terminal_width=100, max_content_width=100)
        first = f"```\n$ {' '.join(path)} --help\n"
        blocks[first] = f"{first}{command.get_help(shown).rstrip()}\n```"
    return blocks


def test_docs_show_the_help_of_every_command() -> None:
    text = DOCS.read_text("utf-8")
    for block in _help_blocks().values():
        # `python -m tests.cli.test_docs` writes them anew.
        assert block in text, f"docs/cli.md must hold this block:\n{block}"


def test_docs_list_every_kind_of_finding() -> None:
    text = DOCS.read_text("utf-8")
    listed = set(re.findall(r"(?m)^\| `([a-z-]+)` \| .+ \|$", text))
    told_as_sentences = {"random", "rounding"}  # notes of verify, whose kind no report shows
    assert {kind.name for kind in CATALOGUE} - told_as_sentences <= listed


def _write_help_into_docs() -> None:
    text = DOCS.read_text("utf-8")
    for first, block in _help_blocks().items():
        start = text.index(first)
        end = text.index("\n```", start + len(first)) + 4
        text = text[:start] + block + text[end:]
    DOCS.write_text(text, "utf-8")


if __name__ == "__main__":
    _write_help_into_docs()
