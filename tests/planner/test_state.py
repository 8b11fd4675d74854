"""Planning leaves alone what it was given and what mergekit keeps for the whole process."""

from __future__ import annotations

import shutil
from pathlib import Path

import transformers
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache

from mergekit_select.inspection import inspect
from mergekit_select.verification import verify
from tests.check.cases import checked
from tests.support.checkpoints import changed
from tests.support.models import Family, small_family, write_family
from tests.support.recipes import SELECTION, merge


def test_no_loader_is_kept_by_verify(tmp_path: Path) -> None:
    out = merge(small_family().recipe(), tmp_path / "out")
    before = (out / "mergekit_config.yml").read_bytes()
    assert verify(out).same
    assert LoaderCache.loaders == {}
    assert (out / "mergekit_config.yml").read_bytes() == before


def test_a_recipe_is_not_modified_by_inspect_and_no_loader_is_kept() -> None:
    LoaderCache.loaders.clear()
    config = MergeConfiguration.model_validate(small_family().recipe())
    before = config.model_dump()
    inspect(config)
    assert config.model_dump() == before
    assert LoaderCache.loaders == {}


def test_no_loader_is_kept_by_check(llamas: Family, tmp_path: Path) -> None:
    LoaderCache.loaders.clear()
    checked(tmp_path, llamas.recipe())
    assert LoaderCache.loaders == {}


def test_models_that_changed_between_two_calls(tmp_path: Path) -> None:
    family = small_family().copied(tmp_path / "models")
    out = merge(family.recipe(), tmp_path / "out")
    assert verify(out).same
    changed(family.subs[0], lambda tensors: tensors["model.norm.weight"].add_(1))
    assert {difference.tensor for difference in verify(out).differences} == {"model.norm.weight"}


def test_an_inferred_architecture_that_was_written_anew(tmp_path: Path) -> None:
    """mergekit caches by path what it infers of a model; the plan must be that of the model that is there now."""

    def tensors_planned(layers: int) -> int:
        shutil.rmtree(tmp_path / "models", ignore_errors=True)
        config = transformers.OPTConfig(
            vocab_size=64,
            hidden_size=16,
            ffn_dim=24,
            num_hidden_layers=layers,
            num_attention_heads=2,
            max_position_embeddings=32,
            word_embed_proj_dim=16,
        )
        family = write_family(tmp_path / "models", transformers.OPTForCausalLM(config))
        (cost,) = checked(tmp_path, family.recipe(SELECTION)).costs
        assert cost.tensors is not None
        assert len(inspect(MergeConfiguration.model_validate(family.recipe(SELECTION))).tensors) == cost.tensors
        return cost.tensors

    assert tensors_planned(1) < tensors_planned(2)
