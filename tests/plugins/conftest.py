"""Site directories to start interpreters in."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.plugins.support import Sandbox, install


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    return Sandbox(tmp_path)


@pytest.fixture
def mergekit(tmp_path: Path) -> Path:
    """A folder with a package mergekit that says when its merge methods are imported."""
    package = tmp_path / "stand-in" / "mergekit" / "merge_methods"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").write_text("print('executed')\nclass Method: pass\n")
    return package.parents[1]


@pytest.fixture
def site_dir(tmp_path: Path) -> Path:
    """A site directory with the package, less what registers, and its startup files."""
    return install(tmp_path / "site", "__init__.py", "_startup.py")
