"""What is read at all: regular files of bounded size, inside the folder of their model, and YAML of bounded length.

Pipes and devices would be waited for, or never end; a kilobyte of YAML can stand for gigabytes. docs/reliability.md
lists the bounds.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any

import yaml

from mergekit_select.errors import UnreadableError

MOST_RECIPE_BYTES = 1 << 20  # the longest recipes seen have some hundred lines
MOST_JSON_BYTES = 64 << 20  # an index of 90,000 tensors, the longest seen, has 9 MB, a tokenizer at most 35 MB
_LOG = "trainer_state.json"  # what a Trainer leaves beside a model, as long as its training; nothing loads it
MOST_VALUES = 20_000  # of a recipe, aliases written out: 1,024 models with weights and filters have 10,000
MOST_DEPTH = 50  # of lists and mappings in a recipe; ten are needed
MOST_DIGITS = 100  # of a whole number in a recipe; turning millions of digits into a number and back takes minutes

_Loader = yaml.SafeLoader  # mergekit's own; libyaml is ten times as fast, and reads some texts otherwise


class BoundError(UnreadableError):
    """A recipe is larger than any recipe can be."""


def read_file(path: Path, most: int) -> bytes:
    """Return the content of a regular file; never waits for a pipe or reads a device.

    Raises:
        UnreadableError: It cannot be read, is no regular file, or has more bytes than ``most``.
    """
    with _opened(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise UnreadableError(f"{path} must have at most {most} bytes, and is larger")
    return content


def read_start(path: Path, count: int) -> bytes:
    """Return at most so many bytes from the beginning of a regular file.

    Raises:
        UnreadableError: As for ``read_file``.
    """
    with _opened(path) as file:
        return file.read(count)


def require_regular(path: Path) -> None:
    """Refuse what cannot be read, or is no regular file.

    Raises:
        UnreadableError: It is one of these.
    """
    with _opened(path):
        pass


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    try:
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
            _require_regular(path, os.fstat(file.fileno()).st_mode)
            yield file
    except OSError as error:
        raise UnreadableError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # a NUL in the path
        raise UnreadableError(f"cannot read {path}: {error}") from error


def require_regular_files(folder: Path) -> None:
    """Refuse a folder in which mergekit or transformers would wait for a pipe, read a device, or fill the memory.

    Raises:
        UnreadableError: An entry is neither a folder nor a regular file, or JSON of more than ``MOST_JSON_BYTES``.
    """
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise UnreadableError(f"cannot read the folder {folder}: {error.strerror}") from error
    for entry in entries:
        path = Path(entry.path)
        try:
            status = entry.stat()
        except OSError:  # a link that leads nowhere: whoever needs the file says that it is missing
            continue
        if not entry.is_dir():
            _require_regular(path, status.st_mode)
        if path.suffix == ".json" and path.name != _LOG and status.st_size > MOST_JSON_BYTES:
            raise UnreadableError(f"{path} must have at most {MOST_JSON_BYTES} bytes, and is larger")


def require_inside(folder: Path, name: str, named_by: Path) -> None:
    """Refuse a file of a model that lies outside the model's folder; a link may lead to a blob of the hub's cache.

    Raises:
        UnreadableError: The name is absolute, or leads out of the folder by ``..`` or as a link.
    """
    parts = PurePosixPath(name).parts
    try:
        target = (folder / name).resolve()
        inside = target.is_relative_to(folder.resolve()) or (
            target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
        )
    except (OSError, ValueError, RuntimeError):  # too long, no text, or a circle of links
        inside = False
    if not parts or ".." in parts or os.path.isabs(name) or not inside:
        raise UnreadableError(f"{named_by} must name files of its own folder, and names {name!r}")


def compose_yaml(text: str) -> Sequence[yaml.Node | None]:
    """Return the nodes of a YAML text's documents.

    Raises:
        BoundError: It has more values, aliases written out, or more levels or longer numbers than a recipe can need.
        yaml.YAMLError: It is no YAML.
    """
    _require_few_events(text)
    documents = list(yaml.compose_all(text, Loader=_Loader))
    sizes: dict[int, int] = {}
    if sum(_size(document, sizes) for document in documents if document is not None) > MOST_VALUES:
        raise BoundError(f"it must have at most {MOST_VALUES} values, and has more once its aliases are written out")
    return documents


def _require_few_events(text: str) -> None:
    depth = 0
    for number, event in enumerate(yaml.parse(text, Loader=_Loader)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MOST_DEPTH:
            raise BoundError(f"it must have at most {MOST_DEPTH} levels, and has more")
        if number > 2 * MOST_VALUES:
            raise BoundError(f"it must have at most {MOST_VALUES} values, and has more")


def _size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Return how many values a node stands for; a node that aliases lead to again is counted again, not visited."""
    if id(node) not in sizes:
        sizes[id(node)] = MOST_VALUES  # while it is visited: a node within itself has no end
        sizes[id(node)] = 1 + sum(_size(child, sizes) for child in _children(node))
    if node.tag.endswith(":int") and len(str(node.value)) > MOST_DIGITS:
        raise BoundError(f"a whole number must have at most {MOST_DIGITS} digits, and one has {len(str(node.value))}")
    return sizes[id(node)]


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from (key, value)
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value


def construct(document: yaml.Node | None) -> Any:
    """Return what a node stands for, as ``yaml.safe_load`` would."""
    return None if document is None else _Loader("").construct_document(document)


def _require_regular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kinds = {"folder": stat.S_ISDIR, "pipe": stat.S_ISFIFO, "socket": stat.S_ISSOCK}
        kind = next((name for name, test in kinds.items() if test(mode)), "device")
        raise UnreadableError(f"{path} must be a regular file, and is a {kind}")
