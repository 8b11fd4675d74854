"""Mutations of files, and what each is fed to; one seed gives one case."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
import yaml

from mergekit_select.check import check
from mergekit_select.errors import MergekitSelectError
from mergekit_select.inputs.checkpoint import read_checkpoint
from mergekit_select.inputs.recipe import read_recipes
from mergekit_select.verification import verify
from tests.support.checkpoints import digests, reshard
from tests.support.models import small_family
from tests.support.recipes import merge

ODD: list[Any] = [
    None, True, False, 0, -1, 1.5, 10**30, -(10**30), 1e308, float("nan"), float("inf"), "", " ", "x" * 300, "x" * 5000,
    "\x1b[2J", "a\nSAME: b", "\u202e", "\ud800", "\0", "../../etc/passwd", "/dev/zero", "~", "a@b@c", "a+b+c",
    [], {}, [[]], [{}], {"": {}}, [None], {"a": None}, [1, 2], "linear", "ties", "parameter_selection", "union", "base",
    "bfloat16", "float8_e4m3fn", "F64", "BOOL", "model.safetensors", ["LlamaForCausalLM"], "MambaForCausalLM", 2**63,
    -(2**63),
]  # fmt: skip
PIECES = [
    b"\0",
    b"\xff\xfe",
    b"{",
    b"[",
    b'"',
    b"&a ",
    b"*a",
    b"<<: ",
    b"!!python/object:os.system ",
    b": ",
    b"- ",
    b"\n",
    b"1e999",
]


def mutated_value(value: Any, random_: random.Random) -> Any:
    """Replace, remove, double or rename something in nested lists and mappings."""
    value = copy.deepcopy(value)
    for _ in range(random_.choice((1, 1, 1, 2, 5))):
        places = [(None, None), *_places(value)]
        holder, key = random_.choice(places)
        if holder is None:
            if random_.random() < 0.1:
                value = copy.deepcopy(random_.choice(ODD))
            continue
        action = random_.randrange(5)
        if action == 0:
            del holder[key]
        elif action == 1 and isinstance(holder, dict):
            holder[random_.choice([item for item in ODD if isinstance(item, str)])] = holder.pop(key)
        elif action == 2:
            holder[key] = [holder[key]] * random_.choice((1, 2, 50))
        elif action == 3:
            holder[key] = {str(key): holder[key]}
        else:
            holder[key] = copy.deepcopy(random_.choice(ODD))
    return value


def _places(value: Any) -> list[tuple[Any, Any]]:
    keys: list[Any] = []
    if isinstance(value, dict):
        keys = list(value)
    elif isinstance(value, list):
        keys = list(range(len(value)))
    return [(value, key) for key in keys] + [place for key in keys for place in _places(value[key])]


def mutated_bytes(content: bytes, random_: random.Random) -> bytes:
    """Flip, cut, double or insert a few bytes."""
    result = bytearray(content)
    for _ in range(random_.choice((1, 1, 2, 8))):
        at = random_.randrange(len(result) + 1)
        action = random_.randrange(4)
        if action == 0 and at < len(result):
            result[at] ^= 1 << random_.randrange(8)
        elif action == 1:
            del result[at:]
        elif action == 2:
            result[at:at] = result[at : at + random_.choice((1, 30, 300))] * random_.choice((1, 3))
        else:
            result[at:at] = random_.choice(PIECES)
    return bytes(result)


def mutated_json(content: bytes, random_: random.Random) -> bytes:
    """Mutate what JSON says, or its bytes."""
    if random_.random() < 0.7:
        return json.dumps(mutated_value(json.loads(content), random_)).encode()
    return mutated_bytes(content, random_)


def mutated_header(content: bytes, random_: random.Random) -> bytes:
    """Mutate the header of a safetensors file, its length, or its data."""
    size = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + size], content[8 + size :]
    action = random_.randrange(4)
    if action == 0:
        return mutated_bytes(content, random_)
    if action == 1:
        length = random_.choice((0, 1, size - 1, size + 1, 2**40, 2**64 - 1)).to_bytes(8, "little")
        return length + header + data
    changed = mutated_json(header, random_)
    return len(changed).to_bytes(8, "little") + changed + data


class Cases:
    """Runs cases in a folder of its own: a family, a good recipe and a good output, each restored after every case."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.family = small_family().copied(folder / "models")
        self.recipe = folder / "recipe.yml"
        self.config = self.family.recipe()
        self.out = merge(self.config, folder / "out")
        self.recipe.write_text(yaml.safe_dump(self.config))
        self.sharded = reshard(self.family.base, folder / "sharded", 2)
        self.digests = digests(self.out)
        self.loaded = transformers.AutoConfig.from_pretrained(self.out).to_dict()

    def targets(self) -> dict[str, Callable[[random.Random], str]]:
        """What is mutated, by name; each returns what came out."""
        base = self.family.base
        index = self.sharded / "model.safetensors.index.json"
        return {
            "recipe text": lambda r: self._fed(self.recipe, mutated_bytes, r, lambda: read_recipes(self.recipe)),
            "recipe": self._recipe,
            "header": lambda r: self._fed(
                base / "model.safetensors", mutated_header, r, lambda: read_checkpoint("m", base)
            ),
            "index": lambda r: self._fed(index, mutated_json, r, lambda: read_checkpoint("m", self.sharded)),
            "config": lambda r: self._fed(base / "config.json", mutated_json, r, lambda: check(self.recipe)),
            "tokenizer": lambda r: self._fed(base / "tokenizer.json", mutated_json, r, lambda: check(self.recipe)),
            "output": self._output,
        }

    def _recipe(self, random_: random.Random) -> str:
        def changed(_content: bytes, random_: random.Random) -> bytes:
            text: str = yaml.safe_dump(_yaml_safe(mutated_value(self.config, random_)), allow_unicode=True)
            return text.encode("utf-8", "replace")

        return self._fed(self.recipe, changed, random_, lambda: check(self.recipe))

    def _output(self, random_: random.Random) -> str:
        file = self.out / random_.choice(
            ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
        )
        change = mutated_header if file.suffix == ".safetensors" else mutated_json
        before = file.read_bytes()

        def judged() -> None:
            answer = verify(self.out)
            if not answer.same:
                raise MergekitSelectError("not the same")
            assert digests(self.out) == self.digests
            assert transformers.AutoConfig.from_pretrained(self.out).to_dict() == self.loaded
            assert not file.name.startswith("tokenizer") or file.read_bytes() == before

        return self._fed(file, change, random_, judged)

    def _fed(
        self,
        file: Path,
        change: Callable[[bytes, random.Random], bytes],
        random_: random.Random,
        run: Callable[[], object],
    ) -> str:
        before = file.read_bytes()
        file.write_bytes(change(before, random_))
        try:
            run()
        except MergekitSelectError:
            return "refused"
        finally:
            if file.is_dir():
                shutil.rmtree(file)
            file.write_bytes(before)
        return "answered"


def _yaml_safe(value: Any) -> Any:
    if isinstance(value, dict):
        return {_yaml_safe(key): _yaml_safe(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_yaml_safe(item) for item in value]
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value
