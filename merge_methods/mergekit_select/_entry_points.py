"""The entry points by which installed distributions offer merge methods, read from their metadata."""

import importlib.metadata
import os
import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass

GROUP = "mergekit.merge_methods"  # also the name of the module that has the registry
OWN_DISTRIBUTION = "mergekit-select"


@dataclass(frozen=True)
class Plugin:
    """One entry point of the group: who offers it, under which name, and where it is.

    Attributes:
        distribution: name of the distribution as its metadata spells it.
        version: its version.
        name: the entry point's name, which should be the method's.
        value: `module:attribute`.
    """

    distribution: str
    version: str
    name: str
    value: str

    @property
    def package(self) -> str:
        """The top-level package or module that the value begins with."""
        return re.split(r"[.:\s]", self.value.strip(), maxsplit=1)[0]

    @property
    def is_own(self) -> bool:
        """Whether this package offers it."""
        return _normalized(self.distribution) == OWN_DISTRIBUTION

    def __str__(self) -> str:
        return f"entry point '{self.name} = {self.value}' of {self.distribution} {self.version}"

    @property
    def sort_key(self) -> tuple[bool, str, str, str]:
        """Our own distribution first, then by name.

        The first to offer a name gets it. File systems list distributions in any order, and a recipe must not
        mean one method here and another there.
        """
        return (not self.is_own, _normalized(self.distribution), self.name, self.value)


def installed_plugins(report: Callable[[str], None]) -> list[Plugin]:
    """Read the group's entry points, of every distribution that an import would find, in a fixed order.

    Args:
        report: Called with a sentence about each distribution whose metadata cannot be read.
    """
    found: set[Plugin] = set()
    for distribution in importlib.metadata.distributions():
        try:
            if GROUP not in (distribution.read_text("entry_points.txt") or ""):
                continue
        except Exception:  # not readable as text, so nothing says that it is about merge methods
            continue
        try:
            found.update(_read(_field(distribution, "Name")))
        except importlib.metadata.PackageNotFoundError:
            continue  # what pip leaves of an interrupted uninstall, a folder "~ame-1.0.dist-info"
        except Exception as error:
            place = os.path.realpath(str(distribution.locate_file("")))  # sys.path may spell one folder twice
            report(
                f"mergekit-select: skipped a distribution with merge methods in {place}: "
                f"reading its metadata raised {cause(error)}. Install it again."
            )
    return sorted(found, key=lambda plugin: plugin.sort_key)


def _read(name: str) -> list[Plugin]:
    # By name: where sys.path holds a distribution twice, this is the one whose modules an import finds.
    distribution = importlib.metadata.distribution(name)
    name, version = _field(distribution, "Name"), _field(distribution, "Version")
    entries = distribution.entry_points.select(group=GROUP)
    return [Plugin(name, version, entry.name, entry.value) for entry in entries]


def _field(distribution: importlib.metadata.Distribution, key: str) -> str:
    # Looking up a field that is missing gives None, a deprecation warning or KeyError, depending on Python.
    if key not in distribution.metadata:
        raise LookupError(f"no {key} in METADATA")
    return distribution.metadata[key]


def cause(error: BaseException) -> str:
    """Return an exception's type and text on one line."""
    return " ".join("".join(traceback.format_exception_only(error)).split())


def _normalized(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()
