"""``verify`` names the tensor, the place and the bits that differ, whichever bit it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_select.verification import Difference, verify
from tests.support.checkpoints import copied, save, tensors_of
from tests.support.commands import invoke
from tests.support.models import small_family
from tests.support.recipes import merge
from tests.verification.support import kinds


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_flipped_bit_of_a_tensor(
    merged: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    out = copied(merged, tmp_path_factory.mktemp("flip") / "out")
    path = out / "model.safetensors"
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    position = data.draw(st.integers(header, len(content) - 1))
    bit = data.draw(st.integers(0, 7))
    content[position] ^= 1 << bit
    path.write_bytes(content)
    answer = verify(out)
    (difference,) = answer.differences
    assert difference.kind == "bits"
    assert difference.count == 1
    # The place that is told must be the one that was changed.
    before, after = tensors_of(merged)[difference.tensor], tensors_of(out)[difference.tensor]
    changed = torch.nonzero(before.view(torch.int16) != after.view(torch.int16))
    assert [tuple(row) for row in changed.tolist()] == [difference.index]
    assert f"0x{before.view(torch.int16)[difference.index].item() % 65536:04x}" in str(difference.expected)
    assert f"0x{after.view(torch.int16)[difference.index].item() % 65536:04x}" in str(difference.found)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_flipped_bit_of_a_header(
    merged: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    out = copied(merged, tmp_path_factory.mktemp("flip") / "out")
    path = out / "model.safetensors"
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    content[data.draw(st.integers(0, header - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    result = invoke("verify", out)
    assert result.exit_code in (1, 2)
    assert result.exit_code == 1 or len(result.output.splitlines()) == 1


def test_sign_of_a_zero_and_payload_of_a_nan_are_bits_too(tmp_path: Path) -> None:
    family = small_family().copied(tmp_path / "models")
    tensors = tensors_of(family.subs[0])
    tensors["model.norm.weight"][:2] = torch.tensor([0.0, float("nan")])
    for sub in family.subs:
        save(sub, tensors)
    out = merge(family.recipe(), tmp_path / "out")
    assert verify(out).same
    tensors = tensors_of(out)
    tensors["model.norm.weight"].view(torch.int16)[:2] ^= torch.tensor([-0x8000, 1], dtype=torch.int16)
    save(out, tensors)
    (difference,) = verify(out).differences
    assert (difference.count, difference.index) == (2, (0,))
    assert (difference.expected, difference.found) == ("0 (0x0000)", "-0 (0x8000)")


def test_missing_tensor(out: Path) -> None:
    tensors = tensors_of(out)
    del tensors["model.norm.weight"]
    save(out, tensors)
    assert verify(out).differences == (Difference("model.norm.weight", "missing", "bfloat16 [32]", None),)
    assert invoke("verify", out).exit_code == 1


def test_extra_tensor(out: Path) -> None:
    save(out, {**tensors_of(out), "model.more": torch.zeros(2)})
    assert verify(out).differences == (Difference("model.more", "extra", None, "float32 [2]"),)


def test_renamed_tensor(out: Path) -> None:
    tensors = tensors_of(out)
    tensors["norm.weight"] = tensors.pop("model.norm.weight")
    save(out, tensors)
    assert verify(out).differences == (Difference("model.norm.weight", "renamed", "model.norm.weight", "norm.weight"),)


def test_a_missing_tensor_among_extra_ones_of_other_bits(out: Path) -> None:
    tensors = tensors_of(out)
    removed = tensors.pop("model.norm.weight")
    more = [f"more{number}" for number in range(8)]
    save(out, tensors | {name: removed + number for number, name in enumerate(more, 1)})
    found = [(difference.kind, difference.tensor) for difference in verify(out).differences]
    assert found == [("missing", "model.norm.weight"), *(("extra", name) for name in more)]


def test_two_tensors_that_changed_names(out: Path) -> None:
    tensors = tensors_of(out)
    names = [f"model.layers.{layer}.input_layernorm.weight" for layer in (0, 1)]
    tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]
    save(out, tensors)
    assert [difference.tensor for difference in verify(out).differences] == names


def test_changed_dtype_and_shape(out: Path) -> None:
    tensors = tensors_of(out)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].half()
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].view(16, 64)
    save(out, tensors)
    assert verify(out).differences == (
        Difference(name, "shape", "bfloat16 [32, 32]", "bfloat16 [16, 64]", elements=1024),
        Difference("model.norm.weight", "dtype", "bfloat16 [32]", "float16 [32]", elements=32),
    )


def test_another_seed_is_another_output(out: Path) -> None:
    path = out / "mergekit_config.yml"
    path.write_text(path.read_text() + "parameters: {seed: 1}\n")
    answer = verify(out)
    assert kinds(answer) == {"bits"}
    assert invoke("verify", out).exit_code == 1
