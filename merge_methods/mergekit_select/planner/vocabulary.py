"""The vocabulary of an output whose tokenizers mergekit aligns: its tokenizer, and where each row comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mergekit.common import ModelReference
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from mergekit.tokenizer.build import TokenizerInfo, build_tokenizer
from mergekit.tokenizer.config import TokenEmbeddingConfig
from mergekit.tokenizer.embed import PermutedVocabulary

from mergekit_select.planner.internals import quiet_tokenizers


def tokenizer_source(config: MergeConfiguration) -> Any:
    """Return what a recipe names as the source of the output's tokenizer; None where tokenizers are not aligned."""
    return config.tokenizer.source if config.tokenizer is not None else config.tokenizer_source


def build(config: MergeConfiguration, options: MergeOptions, models: Sequence[ModelReference]) -> TokenizerInfo:
    """Build the output's tokenizer as mergekit would.

    Args:
        config: A recipe that has mergekit align tokenizers.
        options: The merge's options.
        models: All models of the recipe; mergekit takes them from a set, and in any order the size comes out the same.

    Raises:
        Exception: Whatever mergekit raises where it cannot.
    """
    tokens = (config.tokenizer.tokens if config.tokenizer else None) or {}
    with quiet_tokenizers():
        return build_tokenizer(
            base_model=config.base_model,
            referenced_models=list(models),
            tokenizer_source=tokenizer_source(config),
            trust_remote_code=options.trust_remote_code,
            add_tokens=list(tokens),
        )


def row_count(config: MergeConfiguration, info: TokenizerInfo) -> int:
    """Return the rows of the output's vocabulary, padded as the recipe says."""
    rows = len(info.tokenizer.get_vocab())
    multiple = config.tokenizer.pad_to_multiple_of if config.tokenizer else None
    return -(-rows // multiple) * multiple if multiple else rows


def look_up_row(
    info: TokenizerInfo,
    tensors: Mapping[ModelReference, torch.Tensor],
    token: str,
    settings: TokenEmbeddingConfig,
) -> None:
    """Look up the row that a recipe gives to a token, as mergekit would.

    Raises:
        Exception: Whatever mergekit raises where there is none.
    """
    # The method uses nothing of the task that it belongs to.
    compute: Any = PermutedVocabulary.compute_default_embedding
    compute(None, info, tensors, info.permutations, token, info.tokenizer.get_vocab()[token], settings)
