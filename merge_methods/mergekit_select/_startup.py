"""Register merge methods as soon as ``mergekit.merge_methods`` has been imported.

The startup files `mergekit_select.pth` and `mergekit_select.start` call `install` in every Python process of
the environment, so this module stays small: it imports only what every interpreter has already loaded, and
all it does in a process without mergekit is to put one finder in front of `sys.meta_path`.
"""

import os
import sys
from _thread import get_ident  # built in; importing threading here would cost more than all the rest

TYPE_CHECKING = False  # type checkers take it for True; importing typing would cost more than all the rest
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType

AWAITED = "mergekit.merge_methods"
SWITCH = "MERGEKIT_SELECT_DISABLE"


def turned_off() -> bool:
    """Whether the environment says no: the variable is set, and to something other than "" and "0"."""
    return os.environ.get(SWITCH, "") not in ("", "0")


def install() -> None:
    """Wait for the import of `mergekit.merge_methods`, or register at once where it has happened.

    Calling it again changes nothing: a site directory may be processed twice.
    """
    if turned_off() or _finder in sys.meta_path:
        return
    if AWAITED in sys.modules:  # `python -S`, mergekit, and only then `site.main()`
        _register()
    else:
        sys.meta_path.insert(0, _finder)


def _register() -> None:
    """Register every installed merge method; at worst say in one line why not."""
    try:
        # Asked again: a program may have set the variable after the interpreter started.
        if not turned_off():
            from mergekit_select import _plugins

            _plugins.register_plugins()
    except Exception as error:  # not BaseException: Ctrl-C and SystemExit mean the program, and stop it
        import logging

        logging.getLogger("mergekit_select").warning(
            "mergekit-select: no merge methods of other packages are registered: %s: %s. mergekit runs "
            "without them. Install what fits together: pip install --upgrade mergekit-select "
            "'mergekit>=0.1.5,<0.2'; or set %s=1.",
            type(error).__name__,
            error,
            SWITCH,
        )


class _Finder:
    """A meta-path finder that finds nothing itself, and wraps the loader of one module that others found."""

    def __init__(self) -> None:
        self._asking: set[int] = set()

    def find_spec(
        self, fullname: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        """Return what the finders behind this one say, its loader wrapped; None for every other module."""
        # A finder that asks all of sys.meta_path, as this one does, would come back here without end.
        if fullname != AWAITED or get_ident() in self._asking:
            return None
        self._asking.add(get_ident())
        try:
            spec = self._ask_others(fullname, path, target)
        finally:
            self._asking.discard(get_ident())
        loader = spec.loader if spec is not None else None
        # A loader of the old kind, with load_module only, is left as it is: it has no moment to wait for.
        if spec is not None and loader is not None and hasattr(loader, "exec_module"):
            # A loader may serve many modules (zipimport has one an archive), so it is wrapped, not changed.
            spec.loader = _Loader(loader)  # type: ignore[assignment]  # it has what the import system asks for
        return spec

    def _ask_others(
        self, fullname: str, path: "Sequence[str] | None", target: "ModuleType | None"
    ) -> "ModuleSpec | None":
        for finder in list(sys.meta_path):
            find_spec = getattr(finder, "find_spec", None)
            if finder is not self and find_spec is not None:
                spec: ModuleSpec | None = find_spec(fullname, path, target)
                if spec is not None:
                    return spec
        return None


class _Loader:
    """A module's own loader, plus the registration once the module has been executed."""

    __slots__ = ("_own",)

    def __init__(self, own: "Loader") -> None:
        self._own = own

    def __getattr__(self, name: str) -> object:
        # get_source and so on, for whoever looks at the spec without importing (importlib.util.find_spec).
        if name == "_own":  # not set yet while being copied; asking for it again would never end
            raise AttributeError(name)
        return getattr(self._own, name)

    def exec_module(self, module: "ModuleType") -> None:
        """Execute the module as its own loader does, with that loader back in its place, then register."""
        spec = module.__spec__
        if spec is not None and spec.loader is self:  # type: ignore[comparison-overlap]
            spec.loader = self._own
        if module.__loader__ is self:  # type: ignore[comparison-overlap]
            module.__loader__ = self._own
        self._own.exec_module(module)
        # The import system binds a submodule in its package a moment later, and a plugin may well say
        # `import mergekit.merge_methods` and then `mergekit.merge_methods.merge_method`.
        package, _, name = AWAITED.rpartition(".")
        setattr(sys.modules[package], name, module)
        # Only now may the finder go: after a failed import of mergekit, or Ctrl-C while plugins are imported,
        # the next import is to find it again.
        _register()
        if _finder in sys.meta_path:
            sys.meta_path.remove(_finder)


_finder = _Finder()
