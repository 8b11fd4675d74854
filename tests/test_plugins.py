"""Merge methods of installed distributions, through the group of entry points and through the stock commands.

The first part runs fresh interpreters with a stand-in for mergekit, 0.1 s each; the second the real thing.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import zipfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mergekit_select

INSTALLED = Path(mergekit_select.__file__).parents[1]
DOCUMENT = Path(__file__).parents[1] / "docs" / "plugins.md"

STAND_IN = """
class Spec:
    def __init__(self, name): self.name = name
class MergeMethod:
    def __init__(self, name): self.spec = Spec(name)
_methods = {}
def register(method):
    if method.spec.name in _methods: raise ValueError(f"{method.spec.name} is registered")
    _methods[method.spec.name] = method
def registered_methods(): return tuple(_methods.values())
register(MergeMethod("linear"))
"""
METHOD = "from mergekit.merge_methods import MergeMethod\nmethod = MergeMethod({!r})\n"
NAMES = "import mergekit.merge_methods as m; print(*(known.spec.name for known in m.registered_methods()))\n"


def distribution(
    folder: Path,
    name: str,
    entries: Mapping[str, str],
    modules: Mapping[str, str],
    version: str = "1.0",
) -> Path:
    """Lay a distribution with its modules into the folder, as an installer would."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = [f"{key} = {value}" for key, value in entries.items()]
    (info / "entry_points.txt").write_text("\n".join(["[mergekit.merge_methods]", *lines, ""]))
    for path, source in modules.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(source)
    return info


def environment(*path: Path, **variables: str) -> dict[str, str]:
    """The environment of the test, less what would make a difference to the interpreter it starts."""
    kept = {key: os.environ[key] for key in os.environ if not key.startswith(("PYTHON", "MERGEKIT"))}
    fixed = {"PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
    return kept | fixed | {"PYTHONPATH": os.pathsep.join(map(str, path))} | variables


# ---- with a stand-in for mergekit


class Sandbox:
    """A site directory with the package and a stand-in for mergekit, and a folder for plugins in front."""

    def __init__(self, folder: Path) -> None:
        self.site = folder / "site"
        self.plugins = folder / "plugins"
        self.plugins.mkdir()
        for package in ("mergekit_select", "mergekit/merge_methods"):
            (self.site / package).mkdir(parents=True)
        for name in ("__init__.py", "_startup.py", "_plugins.py"):
            shutil.copy(INSTALLED / "mergekit_select" / name, self.site / "mergekit_select")
        shutil.copy(INSTALLED / "mergekit_select.pth", self.site)
        shutil.copy(INSTALLED / "mergekit_select.start", self.site)
        (self.site / "mergekit" / "__init__.py").touch()
        (self.site / "mergekit" / "merge_methods" / "__init__.py").write_text(STAND_IN)

    def add(self, name: str, entries: Mapping[str, str], modules: Mapping[str, str], version: str = "1.0") -> Path:
        return distribution(self.plugins, name, entries, modules, version)

    def run(
        self, code: str = NAMES, options: Sequence[str] = (), start: bool = True, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        head = f"import site; site.addsitedir({str(self.site)!r})\n" if start else ""
        return subprocess.run(
            [sys.executable, "-S", *options, "-c", head + textwrap.dedent(code)],
            env=environment(self.plugins, self.site, **variables),
            cwd=self.plugins,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def names(self, code: str = NAMES, start: bool = True, **variables: str) -> list[str]:
        """What the code prints, where nothing is to be said."""
        result = self.run(code, start=start, **variables)
        assert (result.returncode, result.stderr) == (0, "")
        return result.stdout.split()


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    return Sandbox(tmp_path)


def test_a_plugin_is_found(sandbox: Sandbox) -> None:
    sandbox.add("good", {"good": "good:method"}, {"good.py": METHOD.format("good")})
    assert sandbox.names() == ["linear", "good"]


@pytest.mark.parametrize(
    "source",
    [
        "import mergekit.merge_methods\nmethod = mergekit.merge_methods.MergeMethod('good')",
        "from mergekit import merge_methods\nmethod = merge_methods.MergeMethod('good')",
        "import mergekit.merge_methods as m\nmethod = m.MergeMethod('good')",
        "from mergekit.merge_methods import *\nmethod = MergeMethod('good')",
    ],
)
def test_a_plugin_may_import_mergekit_in_any_way(sandbox: Sandbox, source: str) -> None:
    sandbox.add("good", {"good": "good:method"}, {"good.py": source})
    assert sandbox.names() == ["linear", "good"]


@pytest.mark.parametrize("value", ["good.methods:Methods.good", " good.methods : Methods.good [extra]"])
def test_forms_of_an_entry_point(sandbox: Sandbox, value: str) -> None:
    source = METHOD.format("good") + "class Methods: good = method"
    sandbox.add("good", {"good": value}, {"good/__init__.py": "", "good/methods.py": source})
    assert sandbox.names() == ["linear", "good"]


UNPRINTABLE = "<exception str() failed>" if sys.version_info >= (3, 11) else "<unprintable Error object>"

BROKEN = {
    "raises": (
        "broken:method",
        "raise RuntimeError('two\\n lines')",
        "importing broken raised RuntimeError: two lines. "
        'Update or uninstall bad; python -c "import broken" shows where it fails.',
    ),
    "raises an error that has no text": (
        "broken:method",
        "class Error(Exception):\n    def __str__(self): raise ValueError\nraise Error",
        f"importing broken raised broken.Error: {UNPRINTABLE}. "
        'Update or uninstall bad; python -c "import broken" shows where it fails.',
    ),
    "module missing": (
        "nowhere:method",
        "",
        "importing nowhere raised ModuleNotFoundError: No module named 'nowhere'. "
        'Update or uninstall bad; python -c "import nowhere" shows where it fails.',
    ),
    "names nothing": (
        "broken:nothing.at_all",
        "",
        "looking up nothing.at_all in broken raised AttributeError: module 'broken' has no attribute "
        "'nothing'. Update or uninstall bad; its author should correct the entry point.",
    ),
    "a module": (
        "broken",
        "",
        "it must lead to a mergekit MergeMethod that has a name, not to an object of type module. "
        "Update or uninstall bad; its author can make one with mergekit.merge_methods.merge_method.",
    ),
    "a function": (
        "broken:method",
        "def method(): ...",
        "it must lead to a mergekit MergeMethod that has a name, not to an object of type function. "
        "Update or uninstall bad; its author can make one with mergekit.merge_methods.merge_method.",
    ),
    "a class": (
        "broken:Method",
        "from mergekit.merge_methods import MergeMethod\nclass Method(MergeMethod): ...",
        "it must lead to a mergekit MergeMethod that has a name, not to an object of type type. "
        "Update or uninstall bad; its author can make one with mergekit.merge_methods.merge_method.",
    ),
    "no name": (
        "broken:method",
        METHOD.format(None) + "class Odd(MergeMethod): ...\nmethod.__class__ = Odd",
        "it must lead to a mergekit MergeMethod that has a name, not to an object of type broken.Odd. "
        "Update or uninstall bad; its author can make one with mergekit.merge_methods.merge_method.",
    ),
    "no spec": (
        "broken:method",
        METHOD.format("x") + "del method.spec",
        "looking up method in broken raised AttributeError: 'MergeMethod' object has no attribute 'spec'. "
        "Update or uninstall bad; its author should correct the entry point.",
    ),
    "no module:object": (
        "broken, method",
        "",
        "its value must read package.module:method. "
        "Update or uninstall bad; its author should correct the entry point.",
    ),
    "name taken": (
        "broken:method",
        METHOD.format("linear"),
        "the name 'linear' is taken by mergekit.merge_methods, and stays with it. "
        "Update or uninstall bad; its author can choose another name.",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_costs_one_line(sandbox: Sandbox, case: str) -> None:
    value, source, text = BROKEN[case]
    sandbox.add("bad", {"label": value}, {"broken.py": source})
    sandbox.add("good", {"good": "good:method"}, {"good.py": METHOD.format("good")})
    result = sandbox.run()
    assert result.stderr == f"mergekit-select: skipped entry point 'label = {value}' of bad 1.0: {text}\n"
    assert (result.returncode, result.stdout) == (0, "linear good\n")


@pytest.mark.parametrize("option", ["error", "ignore"])
def test_that_line_depends_on_no_warning_filter(sandbox: Sandbox, option: str) -> None:
    sandbox.add("bad", {"bad": "broken:method"}, {"broken.py": "1/0"})
    result = sandbox.run(options=("-W", option))
    assert result.stdout == "linear\n"
    assert result.stderr.startswith("mergekit-select: skipped entry point 'bad = broken:method' of bad 1.0: ")
    assert result.stderr.count("\n") == 1


def test_problems_are_data_too_and_said_once(sandbox: Sandbox) -> None:
    sandbox.add("bad", {"bad": "broken:method"}, {"broken.py": "print('imported')\n1/0"})
    code = """
        from mergekit_select import _plugins
        _plugins.register_plugins()
        _plugins.register_plugins()
        import mergekit.merge_methods
        print(*_plugins.problems(), sep="\\n")
    """
    result = sandbox.run(code)
    assert result.stdout == "imported\n" + result.stderr
    assert result.stderr.count("\n") == 1


def test_an_entry_point_of_another_name_than_the_method(sandbox: Sandbox) -> None:
    sandbox.add("odd", {"label": "odd:method"}, {"odd.py": METHOD.format("name")})
    result = sandbox.run()
    assert result.stdout == "linear name\n"
    assert result.stderr == (
        "mergekit-select: entry point 'label = odd:method' of odd 1.0 has registered a method of another "
        "name, 'name'. Recipes say merge_method: name; its author should give both the same name.\n"
    )


def test_two_plugins_want_one_name(sandbox: Sandbox) -> None:
    # By the distribution's name, whatever the order on disk: a recipe means the same method everywhere.
    sandbox.add("Beta", {"mean": "beta:method"}, {"beta.py": METHOD.format("mean")})
    sandbox.add("alpha", {"mean": "alpha:method"}, {"alpha.py": METHOD.format("mean")})
    result = sandbox.run(NAMES + "import alpha; print(m.registered_methods()[-1] is alpha.method)")
    assert result.stdout == "linear mean\nTrue\n"
    assert result.stderr == (
        "mergekit-select: skipped entry point 'mean = beta:method' of Beta 1.0: the name 'mean' is taken by "
        "entry point 'mean = alpha:method' of alpha 1.0, and stays with it. "
        "Update or uninstall Beta; its author can choose another name.\n"
    )


def test_the_same_method_twice(sandbox: Sandbox) -> None:
    source = METHOD.format("good") + "from mergekit.merge_methods import register\nregister(method)"
    sandbox.add("good", {"good": "good:method"}, {"good.py": source})
    sandbox.add("renamed", {"good": "good:method"}, {})
    assert sandbox.names() == ["linear", "good"]


def test_the_same_distribution_twice_on_the_path(sandbox: Sandbox) -> None:
    sandbox.add("good", {"good": "good:method"}, {"good.py": METHOD.format("good")}, version="2.0")
    hidden = {"good": "good:method", "older": "older:method"}
    distribution(sandbox.site, "Good", hidden, {"good.py": "1/0", "older.py": METHOD.format("older")})
    assert sandbox.names() == ["linear", "good"]


def test_what_an_interrupted_uninstall_leaves(sandbox: Sandbox) -> None:
    info = sandbox.add("gone", {"gone": "gone:method"}, {})
    info.rename(info.with_name("~one-1.0.dist-info"))
    assert sandbox.names() == ["linear"]


def test_metadata_that_cannot_be_read(sandbox: Sandbox) -> None:
    sandbox.add("good", {"good": "good:method"}, {"good.py": METHOD.format("good")})
    group = b"[mergekit.merge_methods]\n"
    (sandbox.add("binary", {}, {}) / "entry_points.txt").write_bytes(group + b"x = \xff\xfe\n")
    (sandbox.add("empty", {}, {}) / "entry_points.txt").unlink()
    (sandbox.add("nothing", {}, {}) / "entry_points.txt").write_bytes(group + b"nothing\n")
    (sandbox.add("nameless", {"x": "x:x"}, {}) / "METADATA").unlink()
    result = sandbox.run()
    assert (result.returncode, result.stdout) == (0, "linear good\n")
    # What exactly was raised is Python's text, and differs between versions.
    lines = result.stderr.splitlines()
    texts = [re.sub("raised .*[.] Install", "raised ... Install", line) for line in lines]
    assert texts == 2 * [
        f"mergekit-select: skipped a distribution with merge methods in {sandbox.plugins.resolve()}: "
        "reading its metadata raised ... Install it again."
    ]


@pytest.mark.parametrize(("interruption", "code"), [("KeyboardInterrupt", -2), ("SystemExit(3)", 3)])
def test_what_stops_the_program_stops_it(sandbox: Sandbox, interruption: str, code: int) -> None:
    sandbox.add("slow", {"slow": "slow:method"}, {"slow.py": f"raise {interruption}"})
    result = sandbox.run()
    assert (result.returncode, result.stdout) == (code, "")
    assert "mergekit-select:" not in result.stderr


def test_a_second_try_after_ctrl_c(sandbox: Sandbox) -> None:
    source = "import sys\nif not hasattr(sys, 'go'): raise KeyboardInterrupt\n"
    sandbox.add("slow", {"slow": "slow:method"}, {"slow.py": source + METHOD.format("slow")})
    code = """
        import sys
        try:
            import mergekit.merge_methods
        except KeyboardInterrupt:
            sys.go = True
    """
    assert sandbox.names(textwrap.dedent(code) + NAMES) == ["linear", "slow"]


def test_a_mergekit_too_old_for_plugins(sandbox: Sandbox) -> None:
    sandbox.add("good", {"good": "good:method"}, {"good.py": "1/0"})
    module = sandbox.site / "mergekit" / "merge_methods" / "__init__.py"
    module.write_text("def get(name): ...")
    result = sandbox.run("import mergekit.merge_methods; print('merges')")
    assert (result.returncode, result.stdout) == (0, "merges\n")
    assert result.stderr.startswith(
        "mergekit-select: no merge methods of other packages are registered: "
        "ImportError: the mergekit installed has no mergekit.merge_methods.MergeMethod. mergekit runs without"
    )
    assert result.stderr.count("\n") == 1


# ---- a plugin's own module imported first


IN_A_PACKAGE = {
    "pack/__init__.py": "import mergekit.merge_methods\nfrom pack.methods import method\n",
    "pack/helper.py": "import mergekit.merge_methods\nname = 'good'\n",
    "pack/methods.py": "from pack.helper import name\n" + METHOD.format("good"),
}


@pytest.mark.parametrize(
    ("value", "modules", "first"),
    [
        ("good:method", {"good.py": METHOD.format("good")}, "good"),
        ("pack:method", IN_A_PACKAGE, "pack"),
        ("pack.methods:method", IN_A_PACKAGE, "pack"),
        ("pack.methods:method", IN_A_PACKAGE | {"pack/__init__.py": ""}, "pack.methods"),
        ("pack.methods:method", IN_A_PACKAGE | {"pack/__init__.py": ""}, "pack.helper"),
        ("pack.methods:method", IN_A_PACKAGE | {"pack/__init__.py": ""}, "pack.helper, pack.methods"),
    ],
)
def test_a_program_imports_the_plugin_first(sandbox: Sandbox, value: str, modules: dict[str, str], first: str) -> None:
    sandbox.add("good", {"good": value}, modules)
    code = f"""
        import {first}, sys
        from importlib.machinery import ModuleSpec
        imported = [module for name, module in sys.modules.items() if name.startswith(("pack", "good"))]
        assert {{type(module.__spec__) for module in imported}} == {{ModuleSpec}}
    """
    assert sandbox.names(textwrap.dedent(code) + NAMES) == ["linear", "good"]


def test_a_plugin_that_fails_when_a_program_imports_it(sandbox: Sandbox) -> None:
    source = "print('imported')\n" + METHOD.format("bad") + "1/0"
    sandbox.add("bad", {"bad": "broken:method"}, {"broken.py": source})
    code = """
        try:
            import broken
        except ZeroDivisionError as error:
            print(error)
    """
    result = sandbox.run(textwrap.dedent(code) + NAMES)
    assert result.stdout == "imported\ndivision by zero\nlinear\n"
    assert result.stderr == (
        "mergekit-select: skipped entry point 'bad = broken:method' of bad 1.0: importing broken raised "
        "ZeroDivisionError: division by zero. Update or uninstall bad; "
        'python -c "import broken" shows where it fails.\n'
    )


def test_ctrl_c_while_a_program_imports_the_plugin(sandbox: Sandbox) -> None:
    source = METHOD.format("slow") + "raise KeyboardInterrupt"
    sandbox.add("slow", {"slow": "slow:method"}, {"slow.py": source})
    result = sandbox.run("import slow")
    assert result.returncode == -2
    assert "mergekit-select:" not in result.stderr


# ---- the package's own methods


@pytest.fixture
def own(sandbox: Sandbox) -> Sandbox:
    """The sandbox with a distribution mergekit-select whose methods are stand-ins."""
    source = METHOD.format("parameter_selection") + (
        "from mergekit_select import _plugins\n_plugins.register_methods(method)\n"
    )
    entries = {"parameter_selection": "mergekit_select.methods:method"}
    distribution(sandbox.site, "mergekit_select", entries, {"mergekit_select/methods.py": source})
    sandbox.add("good", {"good": "good:method"}, {"good.py": METHOD.format("good")})
    return sandbox


FIRST = "import mergekit_select.methods\n"


def test_own_methods_through_the_same_door(own: Sandbox) -> None:
    assert own.names() == ["linear", "parameter_selection", "good"]


def test_own_module_first(own: Sandbox) -> None:
    assert sorted(own.names(FIRST + NAMES)) == ["good", "linear", "parameter_selection"]


def test_own_module_without_startup_file(own: Sandbox) -> None:
    assert own.names(start=False) == ["linear"]
    assert own.names(FIRST + NAMES, start=False) == ["linear", "parameter_selection", "good"]
    assert own.names(NAMES + FIRST + NAMES, start=False)[1:] == ["linear", "parameter_selection", "good"]


def test_own_module_without_metadata(own: Sandbox) -> None:
    shutil.rmtree(own.site / "mergekit_select-1.0.dist-info")
    assert own.names(FIRST + NAMES, start=False) == ["linear", "parameter_selection", "good"]


def test_own_module_where_discovery_is_turned_off(own: Sandbox) -> None:
    assert own.names(MERGEKIT_SELECT_DISABLE="1") == ["linear"]
    assert own.names(FIRST + NAMES, MERGEKIT_SELECT_DISABLE="1") == ["linear", "parameter_selection"]


def test_own_names_come_first(own: Sandbox) -> None:
    own.add("a", {"parameter_selection": "a:method"}, {"a.py": METHOD.format("parameter_selection")})
    result = own.run()
    assert result.stdout == "linear parameter_selection good\n"
    assert result.stderr == (
        "mergekit-select: skipped entry point 'parameter_selection = a:method' of a 1.0: "
        "the name 'parameter_selection' is taken by "
        "entry point 'parameter_selection = mergekit_select.methods:method' of mergekit_select 1.0, "
        "and stays with it. Update or uninstall a; its author can choose another name.\n"
    )


@pytest.mark.parametrize("code", [NAMES, FIRST + NAMES])
def test_a_mergekit_that_has_such_a_method_itself(own: Sandbox, code: str) -> None:
    module = own.site / "mergekit" / "merge_methods" / "__init__.py"
    module.write_text(STAND_IN + "register(MergeMethod('parameter_selection'))")
    result = own.run(code)
    assert result.stdout == "linear parameter_selection good\n"
    assert result.stderr.count("\n") == 1
    assert "the name 'parameter_selection' is taken by mergekit.merge_methods, and stays" in result.stderr


def test_a_mergekit_that_reads_the_group_itself(own: Sandbox) -> None:
    module = own.site / "mergekit" / "merge_methods" / "__init__.py"
    code = (
        "from importlib.metadata import entry_points\n"
        "for entry in entry_points(group='mergekit.merge_methods'): register(entry.load())"
    )
    module.write_text(STAND_IN + code)
    assert sorted(own.names()) == ["good", "linear", "parameter_selection"]


def test_a_plugin_that_builds_on_ours(own: Sandbox) -> None:
    source = "from mergekit_select.methods import method as other\n" + METHOD.format("built")
    own.add("built", {"built": "built:method"}, {"built.py": source})
    for start in ("", FIRST, "import built\n"):
        assert sorted(own.names(start + NAMES)) == ["built", "good", "linear", "parameter_selection"]


# ---- with mergekit itself


BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE)
PYPROJECT, MODULE, RECIPE, PROGRAM, PRINTED, WARNING, IMPORT = (text for _, text in BLOCKS)

OWN = ["parameter_selection", "parameter_selection_resampling"]
MODELS = ("base", "a", "b", "c")

BROKEN_FOR_REAL = [
    "mergekit-select: skipped entry point 'other = bad_name:other' of bad-name 1.0: "
    "the name 'linear' is taken by mergekit.merge_methods.linear, and stays with it. "
    "Update or uninstall bad-name; its author can choose another name.",
    "mergekit-select: skipped entry point 'nothing = bad_nothing:nothing' of bad-nothing 1.0: "
    "looking up nothing in bad_nothing raised "
    "AttributeError: module 'bad_nothing' has no attribute 'nothing'. "
    "Update or uninstall bad-nothing; its author should correct the entry point.",
    "mergekit-select: skipped entry point 'raises = bad_raises:method' of bad-raises 1.0: "
    "importing bad_raises raised ModuleNotFoundError: No module named 'nothing_of_that_name'. "
    'Update or uninstall bad-raises; python -c "import bad_raises" shows where it fails.',
    "mergekit-select: skipped entry point 'text = bad_type:text' of bad-type 1.0: "
    "it must lead to a mergekit MergeMethod that has a name, not to an object of type str. "
    "Update or uninstall bad-type; its author can make one with mergekit.merge_methods.merge_method.",
]


def save_models(folder: Path) -> None:
    """Save Llamas of a few hundred parameters as ./models/base, a, b and c."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 16,
    }
    layer = "model.layers.0."
    projections = [f"{layer}self_attn.{x}_proj" for x in "qkvo"]
    projections += [f"{layer}mlp.{x}_proj" for x in ("gate", "up", "down")]
    norms = ["model.norm", f"{layer}input_layernorm", f"{layer}post_attention_layernorm"]
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(projections, (8, 8))
    shapes |= dict.fromkeys(norms, (8,)) | dict.fromkeys(["model.embed_tokens", "lm_head"], (16, 8))
    random = torch.Generator().manual_seed(0)
    for model in MODELS:
        place = folder / "models" / model
        place.mkdir(parents=True)
        (place / "config.json").write_text(json.dumps(config))
        tensors = {f"{name}.weight": torch.randn(shapes[name], generator=random) for name in shapes}
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})


def recipe(method: str, name: str | None = None, file: str = "") -> str:
    text = {
        "merge_method": method,
        "base_model": f"./models/base{file}",
        "models": [{"model": f"./models/{model}{file}"} for model in "abc"],
        "dtype": "float32",
    }
    return json.dumps(text | ({"name": name} if name else {}))


@pytest.fixture(scope="module")
def documented(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plugin of docs/plugins.md, built with pip and unpacked."""
    folder = tmp_path_factory.mktemp("documented")
    (folder / "pyproject.toml").write_text(PYPROJECT)
    (folder / "mergekit_median.py").write_text(MODULE)
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", "dist", "."]
    subprocess.run(command, check=True, env=environment(), cwd=folder)
    (wheel,) = (folder / "dist").iterdir()
    zipfile.ZipFile(wheel).extractall(folder / "installed")
    return folder / "installed"


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One plugin of each broken kind."""
    folder = tmp_path_factory.mktemp("broken")
    method = (
        "import torch\nfrom mergekit.merge_methods import TensorBatch, merge_method\n"
        "@merge_method(name='linear')\ndef other(batch: TensorBatch) -> torch.Tensor: ...\n"
    )
    missing = "import nothing_of_that_name"
    distribution(folder, "bad-name", {"other": "bad_name:other"}, {"bad_name.py": method})
    distribution(folder, "bad-nothing", {"nothing": "bad_nothing:nothing"}, {"bad_nothing.py": ""})
    distribution(folder, "bad-raises", {"raises": "bad_raises:method"}, {"bad_raises.py": missing})
    distribution(folder, "bad-type", {"text": "bad_type:text"}, {"bad_type.py": "text = 'linear'"})
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models and recipes, and later with what the commands make of them."""
    folder = tmp_path_factory.mktemp("work")
    save_models(folder)
    (folder / "median.yml").write_text(RECIPE)
    (folder / "multi.yml").write_text("\n---\n".join(recipe(name, f"by_{name}") for name in OWN))
    (folder / "pytorch.yml").write_text(recipe(OWN[1], file="/model.safetensors"))
    return folder


Results = dict[str, "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def results(work: Path, documented: Path, broken: Path) -> Results:
    """Every process that imports mergekit, two at a time: most of what they do is to import torch."""
    script = Path(sysconfig.get_path("scripts"))
    quiet = ["--no-copy-tokenizer", "--no-write-model-card", "--quiet"]
    site_packages = [Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")]
    own = "".join(f"print(merge_tensors(tensors, {name!r}, base_index=0).tolist())\n" for name in OWN)
    commands: dict[str, tuple[list[str | Path], dict[str, str]]] = {
        "yaml": ([script / "mergekit-yaml", "median.yml", "out", *quiet], environment(broken, documented)),
        "multi": ([script / "mergekit-multi", "multi.yml", "-I", "multi", *quiet], environment()),
        "pytorch": ([script / "mergekit-pytorch", "pytorch.yml", "pytorch", *quiet], environment()),
        "program": ([sys.executable, "-c", PROGRAM + own], environment(documented)),
        "own first": ([sys.executable, "-c", IMPORT + NAMES], environment()),
        "-S": ([sys.executable, "-S", "-c", NAMES + IMPORT + NAMES], environment(INSTALLED, *site_packages)),
        "off": ([sys.executable, "-c", NAMES], environment(MERGEKIT_SELECT_DISABLE="1")),
    }

    def run(name: str) -> subprocess.CompletedProcess[str]:
        command, variables = commands[name]
        return subprocess.run(command, env=variables, cwd=work, capture_output=True, text=True, timeout=300)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(commands, pool.map(run, commands), strict=True))


def assert_merged(out: Path, work: Path) -> None:
    """Every element is one of the sub-models'."""
    merged = load_file(out)
    sources = [load_file(work / "models" / model / "model.safetensors") for model in "abc"]
    assert merged.keys() == sources[0].keys()
    for name, tensor in merged.items():
        assert torch.stack([tensor == source[name] for source in sources]).any(0).all()


def test_mergekit_yaml_with_the_documented_plugin_and_broken_ones(results: Results, work: Path) -> None:
    assert results["yaml"].returncode == 0, results["yaml"].stderr
    lines = results["yaml"].stderr.splitlines()
    assert [line for line in lines if "mergekit-select" in line] == BROKEN_FOR_REAL
    merged = load_file(work / "out" / "model.safetensors")
    sources = [load_file(work / "models" / model / "model.safetensors") for model in "abc"]
    assert merged.keys() == sources[0].keys()
    for name, tensor in merged.items():
        assert tensor.equal(torch.stack([source[name] for source in sources]).median(0).values)


def test_mergekit_multi(results: Results, work: Path) -> None:
    assert results["multi"].returncode == 0, results["multi"].stderr
    assert "mergekit-select" not in results["multi"].stderr
    for name in OWN:
        assert_merged(work / "multi" / f"by_{name}" / "model.safetensors", work)


def test_mergekit_pytorch(results: Results, work: Path) -> None:
    assert results["pytorch"].returncode == 0, results["pytorch"].stderr
    assert "mergekit-select" not in results["pytorch"].stderr
    assert_merged(work / "pytorch" / "model.safetensors", work)


def test_merge_tensors(results: Results) -> None:
    result = results["program"]
    assert (result.returncode, result.stderr) == (0, "")
    printed, *own = result.stdout.splitlines()
    assert printed + "\n" == PRINTED
    assert len(own) == 2
    for values in map(json.loads, own):
        assert values[0] in (2.0, 9.0)
        assert values[1] in (3.0, 4.0)


def test_without_the_startup_file_mergekit_is_as_it_was(results: Results) -> None:
    for name in ("-S", "off", "own first"):
        assert (results[name].returncode, results[name].stderr) == (0, "")
    before, after = (line.split() for line in results["-S"].stdout.splitlines())
    assert "linear" in before
    assert not set(OWN) & set(before)
    assert after == before + OWN
    assert results["off"].stdout.split() == before
    assert results["own first"].stdout.split() == after


def test_the_documented_startup_files() -> None:
    for name in ("mergekit_select.pth", "mergekit_select.start"):
        line = (INSTALLED / name).read_text().splitlines()[-1]
        assert re.search(rf"\| `{name}` \|.*\| `{re.escape(line)}` \|\n", DOCUMENT.read_text())


def test_the_documented_warning(sandbox: Sandbox) -> None:
    entries = {"median": "mergekit_median:median"}
    modules = {"mergekit_median.py": "raise ModuleNotFoundError(\"No module named 'scipy'\")"}
    sandbox.add("mergekit-median", entries, modules)
    assert sandbox.run().stderr == WARNING
