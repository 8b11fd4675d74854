"""Compiles the kernel while a wheel is built, or leaves it out with one line where there is no C compiler.

Without it the package is pure Python (py3-none-any), and torch's operations merge. With it a wheel is for one platform
and every Python (py3-none-PLATFORM): the library knows nothing of Python. ``python hatch_build.py FOLDER [OPTION …]``
compiles the kernel whose source lies in FOLDER, there, with further options for the compiler. It adds the recipes too.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

ROOM = Path("merge_methods", "mergekit_select", "selection")
NAME = f"libkernel{ {'win32': '.dll', 'darwin': '.dylib'}.get(sys.platform, '.so') }"
# No option for this machine's processor: the source itself asks for code for several, chosen from at run time.
OPTIONS = ("-std=c11", "-O3", "-shared", "-Wall", "-Wextra", "-Wpedantic")


def compile_kernel(source: Path, library: Path, further: tuple[str, ...] = ()) -> str | None:
    """Compile the kernel.

    Returns:
        None, or why there is no library, in one line.
    """
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    options = [*OPTIONS, *further, f'-DDIGEST="{digest}"', str(source), "-o", str(library)]
    if sys.platform != "win32":
        options.insert(0, "-fPIC")
    if sys.platform == "darwin":
        options[:0] = _architectures()
    compiler = _compiler()
    if compiler is None:
        return "there is no C compiler (none of cc, gcc and clang is on PATH, and CC is not set)"
    try:
        done = subprocess.run([*compiler, *options], capture_output=True, text=True)
    except OSError as error:
        return f"the C compiler {shlex.join(compiler)} cannot be run: {error}"
    if done.returncode or not library.exists():
        said = (done.stderr or done.stdout).strip().splitlines() or ["it says nothing"]
        return f"the C compiler {shlex.join(compiler)} failed with status {done.returncode}: {said[0]}"
    return None


def _compiler() -> list[str] | None:
    if chosen := os.environ.get("CC"):
        return shlex.split(chosen)
    return next(([name] for name in ("cc", "gcc", "clang") if shutil.which(name)), None)


def _architectures() -> list[str]:
    """Return the options that make the library fit the wheel's tag: a universal Python wants both architectures."""
    if flags := os.environ.get("ARCHFLAGS"):
        return shlex.split(flags)
    _, version, machine = sysconfig.get_platform().split("-")
    machines = ["x86_64", "arm64"] if machine == "universal2" else [machine]
    return [f"-mmacosx-version-min={version}", *(part for name in machines for part in ("-arch", name))]


try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ModuleNotFoundError:  # run as a program, which needs no hatchling
    if __name__ != "__main__":
        raise
else:

    class KernelHook(BuildHookInterface[Any]):
        """Adds the recipes and the compiled kernel to a wheel; an editable installation has both in the checkout."""

        def initialize(self, version: str, build_data: dict[str, Any]) -> None:
            """Compile before the wheel's files are collected."""
            if self.target_name != "wheel":
                return
            source = Path(self.root, ROOM, "kernel.c")
            in_place = version == "editable"
            if not in_place:  # an editable installation reads those of the checkout; a copy would grow old
                build_data["force_include"]["recipes"] = "mergekit_select/recipes"
            self._folder = source.parent if in_place else Path(tempfile.mkdtemp())
            library = self._folder / NAME
            library.unlink(missing_ok=True)
            missing = compile_kernel(source, library)
            if missing is not None:
                self.app.display_warning(f"mergekit-select is installed without its compiled kernel: {missing}")
                return
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["tag"] = f"py3-none-{platform}"
            build_data["pure_python"] = False
            if not in_place:
                build_data["force_include"][str(library)] = f"mergekit_select/selection/{NAME}"

        def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
            """Remove what was compiled for the wheel."""
            if self.target_name == "wheel" and version != "editable":
                shutil.rmtree(self._folder)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    if complaint := compile_kernel(folder / "kernel.c", folder / NAME, tuple(sys.argv[2:])):
        sys.exit(f"the kernel was not compiled: {complaint}")
    print(f"compiled {folder / NAME}")
