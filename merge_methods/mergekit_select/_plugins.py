"""Find the merge methods that installed distributions offer, and register each with mergekit once.

A distribution offers them as entry points in the group `mergekit.merge_methods`. A broken one costs one
warning and nothing else.

mergekit is imported inside the functions only: importing it up here could call `register_plugins` (see
`_startup`) before this module has one.
"""

import importlib
import logging
import re
import sys
from functools import reduce
from typing import TYPE_CHECKING

from mergekit_select._entry_points import GROUP, OWN_DISTRIBUTION, Plugin, cause, installed_plugins
from mergekit_select.errors import MergekitSelectError

if TYPE_CHECKING:
    from mergekit.merge_methods import MergeMethod

# Problems are logged, not given to warnings.warn. mergekit's commands configure logging only after their
# imports, so what is logged here reaches stderr through logging's handler of last resort, as the bare text.
# warnings.warn would fail twice over: scripts around models habitually silence all warnings, and would then
# hear no more than "Unimplemented merge method"; under `-W error` a broken plugin would break every merge.
_log = logging.getLogger("mergekit_select")

_problems: list[str] = []
_handled: set[Plugin] = set()
_offered: list["MergeMethod"] = []
_owners: dict[str, str] = {}


class PluginError(MergekitSelectError):
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


def register_plugins(own_offered: bool = False) -> None:
    """Load and register the merge methods of all installed distributions, each once per process.

    Whatever a plugin raises becomes one warning, SystemExit included: a plugin's sys.exit(0) would end a merge before
    it began, as if it had succeeded.

    Args:
        own_offered: Whether this package's methods have been offered already, by their module, at its end.

    Raises:
        ImportError: there is no mergekit, or one whose merge methods cannot be registered.
    """
    _require_registry()
    for plugin in installed_plugins(_report):
        if plugin in _handled:
            continue
        half_imported = _half_imported(plugin)
        if half_imported and plugin.is_own:
            if own_offered:
                continue
            return  # `methods` comes here again at its end; until then no other plugin may take its names
        _handled.add(plugin)
        try:
            if half_imported:
                _report_skipped(str(plugin), plugin.distribution, _too_early(half_imported))
            else:
                _register(plugin)
        except BaseException:
            _handled.discard(plugin)  # so that a second try in an interactive session can succeed
            raise


def register_methods(*methods: "MergeMethod", and_plugins: bool) -> None:
    """Register methods of this package, then every plugin if so wished.

    For the module that declares the methods, at its end: importing it is then enough where the startup files
    do not run or the package's metadata are missing.
    """
    # Where the module is imported from within mergekit's own import, there is somebody who reads the entry
    # points: `_startup`, or a mergekit that has learnt to, whose register would then find the name taken.
    if _is_being_imported(sys.modules[GROUP]):
        return
    for method in methods:
        try:
            _offer(method, OWN_DISTRIBUTION)
        except PluginError as error:
            _report_skipped(f"method '{method.spec.name}' of {OWN_DISTRIBUTION}", OWN_DISTRIBUTION, error)
    if and_plugins:
        register_plugins(own_offered=True)


def _require_registry() -> None:
    # Asked once, or else each plugin would be blamed for a mergekit before 0.1.5.
    module = importlib.import_module(GROUP)
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
    except (Exception, SystemExit) as error:
        raise _import_error(module_name, error) from error
    try:
        found: object = reduce(getattr, attributes, module)
        if isinstance(found, MergeMethod) and isinstance(found.spec.name, str):
            return found
    except Exception as error:
        raise PluginError(
            f"looking up {'.'.join(attributes)} in {module_name} raised {cause(error)}",
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


def _import_error(module_name: str, error: BaseException) -> PluginError:
    return PluginError(
        f"importing {module_name} raised {cause(error)}",
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
        raise PluginError(f"registering it raised {cause(error)}", "its author should correct it") from error
    _owners[name] = owner


def _home(method: "MergeMethod") -> str:
    """The module that a registered method comes from."""
    # The methods that mergekit's decorator makes are all of the same class; their function tells them apart.
    source = getattr(method, "implementation", type(method))
    return str(getattr(source, "__module__", type(method).__module__))


def _is_being_imported(module: object) -> bool:
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


def _half_imported(plugin: Plugin) -> str:
    """Return a module of the plugin's package that is being imported just now, and so has no method yet; else ""."""
    # Ours is not split up by the commands, which are modules of the same package, and import mergekit themselves.
    own = _target(plugin)[0] if plugin.distribution == OWN_DISTRIBUTION else None
    for name, module in list(sys.modules.items()):  # in the order in which the imports began, the outermost first
        concerned = name == own if own else name.partition(".")[0] == plugin.package
        if concerned and _is_being_imported(module):
            return name
    return ""


def _too_early(module_name: str) -> PluginError:
    return PluginError(
        f"{module_name} was imported before mergekit, and is not complete when mergekit asks for its methods",
        "import mergekit.merge_methods first",
    )


def _report_skipped(what: str, distribution: str, error: PluginError) -> None:
    remedy = f"Update or uninstall {distribution}; {error.advice}"
    _report(f"mergekit-select: skipped {what}: {error.cause}. {remedy}.")


def _report(problem: str) -> None:
    if problem not in _problems:
        _problems.append(problem)
        _log.warning("%s", problem)
