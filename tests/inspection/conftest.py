"""Families in which counting in the output tells where a parameter is from."""

from __future__ import annotations

import pytest
import torch

from tests.support.checkpoints import save, tensors_of
from tests.support.models import Family, small_family


@pytest.fixture(scope="session")
def distinct() -> Family:
    """A family in float32: two values that both moved are practically never equal."""
    return small_family(torch.float32)


@pytest.fixture(scope="session")
def moved(tmp_path_factory: pytest.TempPathFactory, distinct: Family) -> Family:
    """A family without a parameter that two models share, so that an output tells where each is from."""
    family = distinct.copied(tmp_path_factory.mktemp("models") / "models")
    generator = torch.Generator().manual_seed(1)
    for sub in family.subs:
        save(sub, {name: torch.randn(value.shape, generator=generator) for name, value in tensors_of(sub).items()})
    return family
