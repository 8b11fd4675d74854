"""Room on the disk, asked for before a study begins."""

import shutil
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from order_study.errors import StudyError
from order_study.recipes import MODELS, plan
from order_study.settings import BASE, GivenBase, Study
from order_study.states import KEPT

_BYTES = {"bf16": 2, "fp32": 4}
_TRAINED = {"bf16": 2, "bf16_mixed": 4, "fp32": 4}
_STATE = 3  # what training resumes from is a parameter and Adam's two moments of it


def check_space(study: Study, root: Path, jobs: int) -> None:
    """Refuse a study whose models would not fit on the disk.

    Raises:
        StudyError: They would not, by an estimate from the number of parameters.
    """
    parameters = _parameters(study)
    if parameters is None:
        return
    models, training = missing(study, root)
    needed = models * parameters * _BYTES[study.fine_tuning.saved_as]
    if study.fine_tuning.lora is None:  # the states of an adapter are small
        needed += min(jobs, training) * (KEPT + 1) * parameters * _STATE * _TRAINED[study.fine_tuning.precision]
    free = free_space(root)
    if needed > free:
        raise StudyError(
            f"a study must fit on the disk, but {models} models of {parameters:,} parameters, with what training "
            f"resumes from, take about {size(needed)}, and {root} has {size(free)} left: make room, choose another "
            "folder with --out, or ask for fewer orders, checkpoints, merge seeds or jobs"
        )


def missing(study: Study, root: Path) -> tuple[int, int]:
    """How many models a study has yet to write, and how many sub-models it has yet to train."""
    states = range(study.checkpoints)  # after which steps, training decides; so many folders are needed anyway
    merges = sum(not (root / merge.folder).exists() for merge in plan(study, states))
    subs = sum(not (root / MODELS / run.name).exists() for run in study.sub_runs())
    base = not (root / MODELS / BASE).exists()
    return base + subs * (1 + study.checkpoints) + merges, subs


def free_space(folder: Path) -> int:
    """Bytes left where a folder is, or will be."""
    return shutil.disk_usage(next(place for place in (folder, *folder.absolute().parents) if place.exists())).free


def size(amount: int) -> str:
    """An amount of bytes in words."""
    return f"{amount / 1e9:,.1f} GB" if amount >= 1e8 else f"{amount / 1e6:.1f} MB"


def _parameters(study: Study) -> int | None:
    """The number of parameters of each model of a study; None where only training can tell."""
    if isinstance(study.base, GivenBase):
        try:
            config = AutoConfig.from_pretrained(study.base.model, revision=study.base.revision)
        except (OSError, ValueError):
            return None  # training reports it, with what to do
    else:
        config = LlamaConfig(**study.base.architecture.model_dump())
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]  # as it is
    return sum(parameter.numel() for parameter in model.parameters())
