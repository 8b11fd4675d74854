"""Find the merge methods that installed distributions offer, and register each with mergekit once.

A distribution offers them as entry points in the group `mergekit.merge_methods`. A broken one costs one
warning and nothing else.

mergekit is imported inside the functions only: importing it up here could call `register_plugins` (see
`_startup`) before this module has one.
"""

import importlib
import importlib.metadata
import logging
import os
import re
import sys
import traceback
from dataclasses import dataclass
from functools import reduce
from importlib.machinery import ModuleSpec
from typing import TYPE_CHECKING

from mergekit_select import _startup

if TYPE_CHECKING:
    from mergekit.merge_methods import MergeMethod

GROUP = "mergekit.merge_methods"
OWN_DISTRIBUTION = "mergekit-select"

# Problems are logged, not given to warnings.warn. mergekit's commands configure logging only after their
# imports, so what is logged here reaches stderr through logging's handler of last resort, as the bare text.
# warnings.warn would fail twice over: scripts around models habitually silence all warnings, and would then
# hear no more than "Unimplemented merge method"; under `-W error` a broken plugin would break every merge.
_log = logging.getLogger("mergekit_select")

_problems: list[str] = []
_handled: set["Plugin"] = set()
_offered: list["MergeMethod"] = []
_owners: dict[str, str] = {}


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

    def __str__(self) -> str:
        return f"entry point '{self.name} = {self.value}' of {self.distribution} {self.version}"

    @property
    def sort_key(self) -> tuple[bool, str, str, str]:
        """Our own distribution first, then by name.

        The first to offer a name gets it. File systems list distributions in any order, and a recipe must not
        mean one method here and another there.
        """
        distribution = _normalized(self.distribution)
        return (distribution != OWN_DISTRIBUTION, distribution, self.name, self.value)


class PluginError(Exception):
    """Why a plugin cannot be registered, and what helps beside an update.

    Attributes:
        cause: half a sentence that follows the plugin's name and a colon.
        advice: half a sentence that follows "Update or uninstall ...;".
    """

    def __init__(self, cause: str, advice: str) -> None:
        super().__init__(cause)
        self.cause = cause
        self.advice = advice


def problems() -> tuple[str, ...]:
    """The warnings given so far in this process, one per broken plugin."""
    return tuple(_problems)


def register_plugins() -> None:
    """Load and register the merge methods of all installed distributions, each once per process.

    Whatever a plugin raises becomes one warning, except what is meant to stop the program: KeyboardInterrupt,
    SystemExit and their like.

    Raises:
        ImportError: there is no mergekit, or one whose merge methods cannot be registered.
    """
    _require_registry()
    for plugin in installed_plugins():
        if plugin in _handled:
            continue
        if _wait_for_import(plugin):
            return  # comes here again when that has ended; until then no later plugin may take its name
        _handled.add(plugin)
        try:
            _register(plugin)
        except BaseException:
            _handled.discard(plugin)  # so that a second try in an interactive session can succeed
            raise


def register_methods(*methods: "MergeMethod") -> None:
    """Register methods of this package, then every plugin, unless MERGEKIT_SELECT_DISABLE is set.

    For the module that declares the methods, at its end: importing it is then enough where the startup files
    do not run or the package's metadata are missing.
    """
    # Where the module is imported from within mergekit's own import, there is somebody who reads the entry
    # points: `_startup`, or a mergekit that has learnt to, whose register would then find the name taken.
    if _is_being_imported(sys.modules[_startup.AWAITED]):
        return
    for method in methods:
        try:
            _offer(method, OWN_DISTRIBUTION)
        except PluginError as error:
            _report_skipped(f"method '{method.spec.name}' of {OWN_DISTRIBUTION}", OWN_DISTRIBUTION, error)
    if not _startup.turned_off():
        register_plugins()


def installed_plugins() -> list[Plugin]:
    """Read the group's entry points, of every distribution that an import would find, in a fixed order."""
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
            _report(
                f"mergekit-select: skipped a distribution with merge methods in {place}: "
                f"reading its metadata raised {_cause(error)}. Install it again."
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


def _require_registry() -> None:
    # Asked once, or else each plugin would be blamed for a mergekit before 0.1.5.
    module = importlib.import_module(_startup.AWAITED)
    for name in ("MergeMethod", "register", "registered_methods"):
        if not hasattr(module, name):
            raise ImportError(f"the mergekit installed has no {module.__name__}.{name}")


def _register(plugin: Plugin) -> None:
    try:
        method = _load(plugin)
        _offer(method, str(plugin))
    except PluginError as error:
        _report_skipped(str(plugin), plugin.distribution, error)
        return
    if method.spec.name != plugin.name:
        _report(
            f"mergekit-select: {plugin} has registered a method of another name, '{method.spec.name}'. "
            f"Recipes say merge_method: {method.spec.name}; its author should give both the same name."
        )


def _load(plugin: Plugin) -> "MergeMethod":
    from mergekit.merge_methods import MergeMethod

    module_name, attributes = _target(plugin)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise _import_error(module_name, error) from error
    try:
        found: object = reduce(getattr, attributes, module)
        if isinstance(found, MergeMethod) and isinstance(found.spec.name, str):
            return found
    except Exception as error:
        raise PluginError(
            f"looking up {'.'.join(attributes)} in {module_name} raised {_cause(error)}",
            "its author should correct the entry point",
        ) from error
    kind = f"{type(found).__module__}.{type(found).__qualname__}".removeprefix("builtins.")
    raise PluginError(
        f"it must lead to a mergekit MergeMethod that has a name, not to an object of type {kind}",
        "its author can make one with mergekit.merge_methods.merge_method",
    )


def _target(plugin: Plugin) -> tuple[str, list[str]]:
    """Split `package.module:attribute.attribute [extra]`; without attributes the module itself is meant."""
    match = re.fullmatch(r"\s*([\w.]+)\s*(?::\s*([\w.]+))?\s*(?:\[.*\])?\s*", plugin.value)
    if match is None:
        raise PluginError("its value must read package.module:method", "its author should correct the entry point")
    return match[1], match[2].split(".") if match[2] else []


def _import_error(module_name: str, error: Exception) -> PluginError:
    return PluginError(
        f"importing {module_name} raised {_cause(error)}",
        f'python -c "import {module_name}" shows where it fails',
    )


def _offer(method: "MergeMethod", owner: str) -> None:
    """Register the method unless it has been seen before.

    Raises:
        PluginError: another method has its name.
    """
    from mergekit.merge_methods import register, registered_methods

    if any(method is seen for seen in _offered):
        return
    _offered.append(method)
    name = method.spec.name
    holder = next((other for other in registered_methods() if other.spec.name == name), None)
    if holder is method:
        return
    if holder is not None:
        raise PluginError(
            f"the name '{name}' is taken by {_owners.get(name) or _home(holder)}, and stays with it",
            "its author can choose another name",
        )
    try:
        register(method)
    except Exception as error:
        raise PluginError(f"registering it raised {_cause(error)}", "its author should correct it") from error
    _owners[name] = owner


def _home(method: "MergeMethod") -> str:
    """The module that a registered method comes from."""
    # The methods that mergekit's decorator makes are all of the same class; their function tells them apart.
    source = getattr(method, "implementation", type(method))
    return str(getattr(source, "__module__", type(method).__module__))


# A program may import a plugin's module first, and that module mergekit. Then the entry point leads to a
# module that is still being executed and has no method yet. It is looked at again when that import has ended.


def _is_being_imported(module: object) -> bool:
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


def _wait_for_import(plugin: Plugin) -> bool:
    """Put the plugin off if a module of its package is being imported just now; say whether that is so."""
    for name, module in list(sys.modules.items()):  # in the order the imports began, the outermost first
        if name.partition(".")[0] == plugin.package and _is_being_imported(module):
            spec = module.__spec__
            if type(spec) is ModuleSpec:
                spec.__class__ = _WatchedSpec
            return isinstance(spec, _WatchedSpec)  # of a class of its own: it can only be tried, and reported
    return False


class _WatchedSpec(ModuleSpec):
    """A module's spec that notices the end of the import, which the import system marks there only."""

    _initializing: bool

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if name == "_initializing" and not value:
            self.__class__ = ModuleSpec  # type: ignore[assignment]  # it was one before
            _import_ended(self.name)


def _import_ended(name: str) -> None:
    if name not in sys.modules:
        error = sys.exc_info()[1]
        if not isinstance(error, Exception):
            return  # Ctrl-C: the program is being stopped
        # The importer is about to learn of it too. No second try here: it would double side effects.
        for plugin in installed_plugins():
            if plugin.package == name.partition(".")[0] and plugin not in _handled:
                _handled.add(plugin)
                _report_skipped(str(plugin), plugin.distribution, _import_error(name, error))
    register_plugins()


def _report_skipped(what: str, distribution: str, error: PluginError) -> None:
    remedy = f"Update or uninstall {distribution}; {error.advice}"
    _report(f"mergekit-select: skipped {what}: {error.cause}. {remedy}.")


def _report(problem: str) -> None:
    if problem not in _problems:
        _problems.append(problem)
        _log.warning("%s", problem)


def _cause(error: BaseException) -> str:
    """The exception's type and text on one line."""
    return " ".join("".join(traceback.format_exception_only(error)).split())


def _normalized(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()
