"""Room on the disk: asked for before a study begins, and a full disk named as what it is."""

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from examples.order_study.data.records import with_variables
from examples.order_study.errors import StudyError
from examples.order_study.model import SOUP_CANDIDATE, Model, merged, trained
from examples.order_study.settings import DERIVED_CONTROLS, SOUP, GivenBase, Study

KEPT = 2  # states of a training to resume from: the newest may be torn, and then the one before is needed

_FULL = ("No space left on device", "os error 28", "code: 28")  # safetensors and others wrap the error
_NEXT_TO_NOTHING = 1 << 24
_BYTES = {"bf16": 2, "bf16_mixed": 4, "fp32": 4}  # of a parameter, saved or in training
_STATE = 3  # what training resumes from is a parameter and Adam's two moments of it


@contextlib.contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turn what is raised on a full disk into a message that says so.

    Raises:
        StudyError: The disk is full.
    """
    try:
        yield
    except StudyError:
        raise
    except Exception as error:
        free = _free(folder)
        if not _is_full(error, free):
            raise
        raise StudyError(
            f"what is finished is kept, but the disk that holds {folder} is full, with {free / 1e6:.1f} MB left "
            f"({type(error).__name__}: {str(error)[:200]}): make room and run again, which goes on where it stopped"
        ) from error


def check_space(study: Study, root: Path, jobs: int) -> str:
    """Refuse a study whose models would not fit on the disk; otherwise say how much there is to make.

    Raises:
        StudyError: They would not, by an estimate from the number of parameters.
    """
    # After which steps, training decides; so many folders are needed anyway.
    states = range(study.checkpoints)
    subs = [model for model in trained(study, states) if not (root / model.folder).exists()]
    derived = [Model("control", control=name) for name in DERIVED_CONTROLS if name in study.controls]
    merges = [model for model in [*merged(study, states), *derived] if not (root / model.folder).exists()]
    if any(model.control == SOUP for model in merges):
        merges += [Model("control", control=SOUP_CANDIDATE, members=(order,)) for order in study.orders[1:]]
    training = sum(model.kind != "base" and model.step is None for model in subs)
    models = len(subs) + len(merges)
    told = f"{root}: {training} sub-models to train, {len(merges)} merges to make, {models} models to save in all"
    parameters = _parameters(study)
    if parameters is None:
        return told
    needed = models * parameters * _BYTES[study.fine_tuning.saved_as]
    if study.fine_tuning.lora is None:  # the states of an adapter are small
        needed += min(jobs, training) * (KEPT + 1) * parameters * _STATE * _BYTES[study.fine_tuning.precision]
    free = _free(root)
    if needed > free:
        raise StudyError(
            f"a study must fit on the disk, but {models} models of {parameters:,} parameters, with what training "
            f"resumes from, take about {_size(needed)}, and {root} has {_size(free)} left: make room, choose another "
            "folder with --out, or ask for fewer orders, checkpoints, merge seeds or jobs"
        )
    told = f"{told}, of {parameters:,} parameters each; about {_size(needed)} on disk"
    if training and study.fine_tuning.lora is None:
        # The parameters, their gradients, and Adam's two moments.
        memory = (1 + _STATE) * parameters * _BYTES[study.fine_tuning.precision]
        told += f"; a training takes {_size(memory)} of memory, and its activations"
    return told


def _is_full(error: Exception, free: int) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # torch says no more than that a write failed.
    return any(words in str(error) for words in _FULL) or (isinstance(error, RuntimeError) and free < _NEXT_TO_NOTHING)


def _free(folder: Path) -> int:
    """Bytes left where a folder is, or will be."""
    return shutil.disk_usage(next(place for place in (folder, *folder.absolute().parents) if place.exists())).free


def _size(amount: int) -> str:
    return f"{amount / 1e9:,.1f} GB" if amount >= 1e8 else f"{amount / 1e6:.1f} MB"


def _parameters(study: Study) -> int | None:
    """The number of parameters of each model of a study; None where only training can tell."""
    if isinstance(study.base, GivenBase):
        try:
            config = AutoConfig.from_pretrained(with_variables(study.base.model), revision=study.base.revision)
        except (OSError, ValueError):
            return None  # training reports it, with what to do
    else:
        config = LlamaConfig(**study.base.architecture.model_dump())
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]  # as it is
    return sum(parameter.numel() for parameter in model.parameters())
