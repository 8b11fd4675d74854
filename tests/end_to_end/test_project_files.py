"""The files that a visitor of the repository reads first agree with the package and with each other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import mergekit_select

ROOT = Path(__file__).parents[2]


def test_the_citation_is_of_this_version_and_names_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == mergekit_select.__version__
    (paper,) = citation["references"]
    assert paper["title"] == "Mitigating Training Imbalance in LLM Fine-Tuning via Selective Parameter Merging"
    assert "2410.03743" in paper["identifiers"][0]["value"]


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md"])
def test_links_of_the_project_pages_lead_somewhere(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / target).exists(), f"{name} links to {target}"


def test_every_action_of_the_workflows_is_pinned_to_a_commit() -> None:
    workflows = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    assert len(workflows) >= 4
    for workflow in workflows:
        for action in re.findall(r"uses: *(\S+)", workflow.read_text(encoding="utf-8")):
            assert action.startswith("./") or re.search(r"@[0-9a-f]{40}$", action), f"{workflow.name}: {action}"


def test_hooks_before_a_commit_run_the_pinned_tools() -> None:
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE))
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    versions = {
        hook["repo"].rsplit("/", 1)[1].removesuffix("-pre-commit"): hook["rev"].removeprefix("v")
        for hook in hooks
        if hook["repo"] != "local"  # mypy, from the environment that the pins made
    }
    versions.pop("actionlint")  # a Go program
    assert versions == {name: pins[name] for name in ("ruff", "codespell", "zizmor")}


def test_every_make_target_that_the_contributors_page_names_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = re.findall(r"`make ([a-z ]+)`", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert {target for line in named for target in line.split()} <= targets
