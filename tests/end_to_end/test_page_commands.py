"""Every command that a page shows is run by a test, or the table here says what it needs that a test has not."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors
import yaml

from tests.support.checkpoints import copied
from tests.support.models import small_family
from tests.support.pages import PAGES, ROOT, blocks, commands, shown, typed

# Pages whose commands a test runs, one after another.
BY_PAGE = {
    "README.md": "tests/end_to_end/test_page_commands.py::test_the_readme",
    "docs/index.md": "tests/end_to_end/test_page_commands.py::test_the_first_page",
    "docs/large.md": "tests/end_to_end/test_page_commands.py::test_large_merges",
    "docs/plugins.md": "tests/plugins/test_startup_failures.py::test_switch",
    "docs/quickstart.md": "tests/end_to_end/test_quickstart_page.py::test_the_quickstart",
    "docs/sharing.md": "tests/provenance/test_walk.py::test_the_walk_from_recipe_to_a_strangers_reproduction",
    "docs/training.md": "tests/training/test_training_guide.py::test_the_script_for_trl",
    **dict.fromkeys(
        (page.relative_to(ROOT).as_posix() for page in PAGES if page.parent.name == "upstream"),
        "tests/end_to_end/test_page_commands.py::test_reports_to_mergekit_show_what_they_say",
    ),
}
# Single commands that a test elsewhere runs.
BY_COMMAND = {
    "mergekit-select check example.yml out": "tests/end_to_end/test_page_commands.py::test_the_example_of_check",
    "cat example.yml": "tests/end_to_end/test_page_commands.py::test_the_example_of_check",
    "mergekit-select inspect recipes/resample.yml": "tests/end_to_end/test_page_commands.py::test_the_readme",
    "mergekit-select verify out": "tests/verification/test_command.py::test_text",
    "mergekit-select --version": "tests/cli/test_entry.py::test_version_names_what_the_bits_depend_on",
    "mergekit-select recipes show resample > resample.yml": "tests/cli/test_recipes.py::"
    "test_a_recipe_is_shown_as_it_lies_in_the_repository",
    "head -6 resample.yml": "tests/end_to_end/test_page_commands.py::test_the_head_of_a_recipe",
    "mergekit-select merge recipe.yml /shared/out --finish": "tests/cli/test_merge.py::test_finish",
    **dict.fromkeys(
        (
            "mergekit-select run yaml recipes/select.yml out/ --cuda",
            "mergekit-select run multi merges.yml -I parts/",
            "mergekit-select run pytorch recipe.yml out/",
        ),
        "tests/cli/test_entry.py::test_run_passes_all_arguments_on",
    ),
    "make bench": "tests/test_benchmarks.py::test_every_contestant_ran_in_the_first_case",
    "python -m examples.order_study my-study.yaml --out runs/my-study --jobs 2": "tests/examples/"
    "test_order_study_run.py::test_the_study_leaves_all_that_it_says",
    "mergekit-select merge recipe.yml /shared/out --shard $SLURM_ARRAY_TASK_ID/14 --jobs 2 --quiet": "tests/cli/"
    "test_merge.py::test_shares_then_the_whole",
}
NOT_RUN = {
    "pip install .": "a package index; tests/test_packaging.py builds and installs a wheel without one",
    "pip install 'ray>=2.9,<3'": "a package index",
    "make merge": "minutes; its steps are tested in tests/examples/test_quickstart.py",
    "make study": "minutes; the same study, smaller, is tests/examples/test_order_study_run.py",
    "GSM8K=/path/to/gsm8k make study CONFIG=examples/order_study/configs/gsm8k-small.yaml": "GSM8K, and an accelerator",
    "export CLINC150=/folder/with/train.jsonl/val.jsonl/and/test.jsonl "
    "SMOLLM2=HuggingFaceTB/SmolLM2-135M-Instruct": "it only sets variables",
    "python -m examples.order_study examples/order_study/configs/smollm2-clinc150.yaml": "hours, CLINC150 and "
    "SmolLM2; tests/examples/test_order_study_controls.py has a small one with all controls",
    "python -m examples.order_study examples/order_study/configs/smollm2-clinc150.yaml --out runs/smollm2-clinc150-bf16"
    " --set 'throws=[]' --set 'orders=[1, 2, 3, 4, 5]' --set fine_tuning.seed=1 --set fine_tuning.precision=bf16"
    " --set 'controls=[ties, dare_ties, stretch-1.1, stretch-1.25, stretched, shrunk, soup, ensemble]'": "hours, of "
    "the same",
    "export GSM8K=/folder/with/train.jsonl/and/test.jsonl "
    "SMOLLM2=HuggingFaceTB/SmolLM2-135M-Instruct": "it only sets variables",
    "python -m examples.order_study examples/order_study/configs/smollm2-gsm8k.yaml": "hours, GSM8K and SmolLM2; "
    "tests/examples/test_order_study_controls.py has a small one with all controls",
    "python -m examples.order_study examples/order_study/configs/smollm2-gsm8k.yaml --out runs/smollm2-gsm8k-double "
    "--set 'throws=[]' --set 'orders=[1, 2, 3]' --set fine_tuning.seed=1 --set 'controls=[stretch-1.1]' "
    "--set 'merging.seeds=[0]' "
    "--set fine_tuning.learning_rate=4.0e-4": "an hour, of the same",
    "python -m examples.order_study examples/order_study/configs/smollm2-gsm8k.yaml --out runs/smollm2-gsm8k-constant "
    "--set 'throws=[]' --set 'orders=[1, 2, 3]' --set fine_tuning.seed=1 --set 'controls=[stretch-1.1]' "
    "--set 'merging.seeds=[0]' "
    "--set fine_tuning.schedule=constant_with_warmup --set fine_tuning.warmup_steps=0": "an hour, of the same",
    "python -m examples.order_study examples/order_study/configs/smollm2-gsm8k.yaml --out "
    "runs/smollm2-gsm8k-constant-warmup "
    "--set 'throws=[]' --set 'orders=[1, 2, 3]' --set fine_tuning.seed=1 --set 'controls=[stretch-1.1]' "
    "--set 'merging.seeds=[0]' --set fine_tuning.schedule=constant_with_warmup": "an hour, of the same",
    "python -m examples.order_study examples/order_study/configs/smollm2-gsm8k.yaml --out runs/smollm2-gsm8k-linear "
    "--set 'throws=[]' --set 'orders=[1, 2]' --set fine_tuning.seed=1 --set 'controls=[stretch-1.1]' "
    "--set 'merging.seeds=[0]' --set fine_tuning.schedule=linear": "an hour, of the same",
    "make test": "it runs this test",
    "echo $?": "the test of the command before it looks at the exit code",
    "parallel --sshloginfile nodes.txt --workdir . -j1 'mergekit-select merge recipe.yml out --shard {}/8 --quiet' "
    "::: {1..8}": "several machines",
    "mergekit-select merge recipe.yml /shared/out --ray 10.0.0.1:6379": "several machines; tests/execution/"
    "test_cluster.py has a cluster on one",
    'eval "$(_MERGEKIT_SELECT_COMPLETE=bash_source mergekit-select)"': "an interactive shell",
    'eval "$(_MERGEKIT_SELECT_COMPLETE=zsh_source mergekit-select)"': "an interactive shell",
    "_MERGEKIT_SELECT_COMPLETE=fish_source mergekit-select | source": "an interactive shell",
    "tune run full_finetune_single_device --config llama3_2/1B_full_single_device dataset.source=json "
    "dataset.data_files=train-1000.jsonl seed=0 output_dir=models/order-1000": "torchtune; the page says so",
}


def helps(command: str) -> bool:
    """Whether tests/cli/test_docs.py compares what the page shows below the command."""
    return command.endswith("--help")


def test_every_command_is_run_or_the_table_says_why_not() -> None:
    left = []
    used = set()
    for file in PAGES:
        page = file.relative_to(ROOT).as_posix()
        for command in commands(page):
            used |= {page, command}
            if not (helps(command) or page in BY_PAGE or command in BY_COMMAND or command in NOT_RUN):
                left.append(f"{page}: {command}")
    assert not left
    assert not {*BY_PAGE, *BY_COMMAND, *NOT_RUN} - used, "no page shows these any more"


@pytest.mark.parametrize("test", sorted({*BY_PAGE.values(), *BY_COMMAND.values()}))
def test_the_tests_of_the_table_exist(test: str) -> None:
    file, name = test.split("::")
    assert re.search(rf"^def {name}\(", (ROOT / file).read_text("utf-8"), re.MULTILINE)


def test_commands_stand_in_blocks_that_say_so() -> None:
    program = r"(?:mergekit|make|pip|python|\$ )"
    for file in PAGES:
        outside = re.sub(r"^```.*?^```", "", file.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
        assert not re.findall(rf"^    {program}.*$", outside, re.MULTILINE), file


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: the recipes, and small models under the names of those that `make merge` trains."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    for name, model in zip(("base", "order-1", "order-2", "order-3"), small_family().everyone, strict=True):
        copied(model, tmp_path / "models" / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def without_figures(lines: list[str]) -> list[str]:
    """What does not depend on the models; `check` also says how much memory and disk they need."""
    return [" ".join(re.sub(r"[\d.,]+", "0", line).split()) for line in lines if not line.startswith("reads ")]


def shows(page: str, command: str, printed: str) -> None:
    """Assert that a page shows the beginning of what a command printed, with figures of its own."""
    expected = without_figures(shown(page, command))
    assert without_figures(printed.splitlines())[: len(expected)] == expected


def test_the_readme(clone: Path) -> None:
    select = Path("recipes/select.yml").read_text("utf-8")
    (recipe,) = blocks("README.md", "yaml")
    assert yaml.safe_load(recipe) == yaml.safe_load(select)
    merging, verifying, *_, checking, inspecting, version = commands("README.md")
    typed(merging)
    shows("README.md", verifying, typed(verifying))
    Path("recipes/select.yml").write_text(select.replace("seed:", "sede:").replace("order-2", "order-9"))
    shows("README.md", checking, typed(checking, 1))
    shows("README.md", inspecting, typed(inspecting))
    assert version == "mergekit-select --version"


def test_the_first_page(clone: Path) -> None:
    Path("select.yml").write_text(blocks("docs/index.md", "yaml")[0])
    checked, _, verified = map(typed, commands("docs/index.md"))
    assert checked.splitlines()[-1].startswith("this merge would work: 0 errors, ")
    assert verified.startswith("SAME")


def test_large_merges(clone: Path) -> None:
    shutil.copy("recipes/select.yml", "recipe.yml")
    for command in commands("docs/large.md"):
        if command not in NOT_RUN and command not in BY_COMMAND:
            typed(command.replace(" /", f" {clone}/"))
    for out in ("out", "data/out"):
        assert typed(f"mergekit-select verify ./{out}").startswith("SAME")


def test_the_example_of_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, model in zip(("base", "sub1", "sub2"), small_family().everyone, strict=False):
        copied(model, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    Path("example.yml").write_text("\n".join(shown("docs/cli.md", "cat example.yml")))
    command = "mergekit-select check example.yml out"
    shows("docs/cli.md", command, typed(command, 1))


def test_the_head_of_a_recipe() -> None:
    head = (ROOT / "recipes" / "resample.yml").read_text("utf-8").splitlines()[:6]
    assert shown("docs/cli.md", "head -6 resample.yml") == head


SHOWN = {
    "tokenizer-copy-fails-silently": lambda: not Path("out/tokenizer.json").exists(),
    "two-merges-into-one-folder": lambda: Path("out").is_dir(),
    "weight-map-leads-out-of-the-folder": lambda: Path("out/config.json").exists(),
    "weights-of-an-earlier-merge-stay": lambda: Path("out/model.safetensors").exists(),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHOWN)
def test_reports_to_mergekit_show_what_they_say(name: str, clone: Path) -> None:
    base = copied(clone / "models" / "base", clone / "base")
    file = (base / "model.safetensors").rename(base / "model-00001-of-00001.safetensors")
    with safetensors.safe_open(file, "pt") as opened:
        index = {"metadata": {}, "weight_map": dict.fromkeys(opened.keys(), file.name)}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    for recipe in ("recipe.yml", "one.yml", "another.yml"):
        Path(recipe).write_text(Path("recipes/select.yml").read_text("utf-8").replace("./models/base", "./base"))
    (script,) = blocks(f"docs/upstream/{name}.md", "bash")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["bash", "-e", "-c", script], check=True, capture_output=True, env={**os.environ, "PATH": path})
    assert SHOWN[name]()
