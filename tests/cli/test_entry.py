"""What the commands share: the version, the help without torch, usage; and ``run``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from tests.support.checkpoints import digests
from tests.support.commands import invoke, run, script
from tests.support.models import Family
from tests.support.recipes import SELECTION, merge, written


def test_version_names_what_the_bits_depend_on() -> None:
    import mergekit_select

    result = invoke("--version")
    assert result.exit_code == 0
    lines = dict(line.split() for line in result.stdout.splitlines())
    assert lines.keys() == {"mergekit-select", "mergekit", "torch", "draws", "kernel"}
    assert lines["mergekit-select"] == mergekit_select.__version__
    assert lines["draws"] == "1"


@pytest.mark.parametrize("name", ["check", "inspect", "verify"])
def test_merge_options_are_mergekits_own(name: str) -> None:
    from mergekit.options import MergeOptions, add_merge_options

    decorated: Any = add_merge_options(lambda: None)
    stock = {option.name: option for option in decorated.__click_params__}
    main: Any = script("mergekit-select")
    command = main.get_command(click.Context(main), name)
    shared = [option for option in command.params if option.name in {*MergeOptions.model_fields} - {"quiet"}]
    assert {"trust_remote_code", "lora_merge_cache"} <= {option.name for option in shared}
    for option in shared:
        assert option.get_default(click.Context(command)) == MergeOptions.model_fields[option.name].default
        assert option.opts[0] in stock[option.name].opts
        if option.name != "out_shard_size":  # a type of its own: the stock command's gives text
            assert type(option.type) is type(stock[option.name].type), option.name


def test_help_is_shown_without_torch() -> None:
    code = (
        "import sys\nfrom mergekit_select.cli import main\n"
        "for command in (['--help'], ['check', '--help'], ['run', '--help']):\n"
        "    main(command, standalone_mode=False)\n"
        "assert 'torch' not in sys.modules and 'mergekit' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_wrong_usage_exits_with_2() -> None:
    for arguments in (["chek"], ["check"], ["check", "--absent", "r.yml"], ["run", "toml"]):
        assert invoke(*arguments).exit_code == 2


def test_run_is_the_stock_command_with_the_methods_registered(llamas: Family, tmp_path: Path) -> None:
    # Without the startup file nothing but `run` makes the methods known.
    file = written(tmp_path / "recipe.yml", llamas.recipe(SELECTION))
    off = {"MERGEKIT_SELECT_DISABLE": "1"}
    result = run("mergekit-select", "run", "yaml", file, tmp_path / "out", "--quiet", "--no-copy-tokenizer", env=off)
    assert result.returncode == 0, result.stderr
    merge(llamas.recipe(SELECTION), tmp_path / "expected")
    assert digests(tmp_path / "out") == digests(tmp_path / "expected")
    assert not (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("name", "stock"), [("yaml", "run_yaml"), ("multi", "multimerge"), ("pytorch", "merge_raw_pytorch")]
)
def test_run_passes_all_arguments_on(name: str, stock: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    import click

    seen: list[tuple[str, ...]] = []
    module = importlib.import_module(f"mergekit.scripts.{stock}")
    command = click.Command(
        "stock",
        callback=lambda rest: seen.append(rest),
        params=[click.Argument(["rest"], nargs=-1)],
        context_settings={"ignore_unknown_options": True, "help_option_names": []},
    )
    monkeypatch.setattr(module, "main", command)
    assert invoke("run", name, "a.yml", "--help", "-v", "--cuda", "out").exit_code == 0
    assert seen == [("a.yml", "--help", "-v", "--cuda", "out")]


@pytest.mark.parametrize("option", ["--num-threads=0", "--num-threads=-1", f"--random-seed={10**30}"])
def test_numbers_that_torch_would_refuse(option: str, tmp_path: Path) -> None:
    result = invoke("verify", tmp_path, option)
    assert result.exit_code == 2
    assert f"Invalid value for {option.partition('=')[0]}: must be at least" in result.stderr
