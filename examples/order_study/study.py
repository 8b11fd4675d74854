"""Train the models of a study, base first; finished ones are reused."""

import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from order_study import checkpoints, text
from order_study.checkpoints import Origin
from order_study.evaluation import load_tokenizer
from order_study.folders import discard, file_digest
from order_study.parts import ensure_parts
from order_study.settings import Part, Run, Study
from order_study.tokens import encode, train_tokenizer
from order_study.training import fresh_model, train

TEXT_FOLDER = "text"


def train_study(study: Study, out: Path, report: Callable[[str], None]) -> None:
    """Have text, base and sub-models of a study in `out`; `report` is told what was done for each model."""
    parts = ensure_parts(out / TEXT_FOLDER, study.text)
    runs = [study.base_run(), *study.sub_runs()]
    # Before anything is trained: a run that is cut off must not leave sub-models of a base that is gone.
    for name in _outdated(runs, parts, out):
        discard(out / name)
    for run in runs:
        start = None if run.start is None else out / run.start
        origin = _origin(run, parts, start)
        if checkpoints.is_finished(out / run.name, origin):
            report(f"{out / run.name}: reused")
            continue
        began = time.monotonic()
        model, tokenizer = _start(run, parts[run.part], start)
        samples = encode(parts[run.part], tokenizer, run.architecture.max_position_embeddings)
        train(model, samples, tokenizer, run)
        checkpoints.save(out / run.name, model, tokenizer, origin)
        report(f"{out / run.name}: trained in {time.monotonic() - began:.0f} s")


def _outdated(runs: list[Run], parts: dict[Part, list[str]], out: Path) -> list[str]:
    names: list[str] = []
    for run in runs:
        if checkpoints.is_outdated(out / run.name, _origin(run, parts, None)) or run.start in names:
            names.append(run.name)
    return names


def _origin(run: Run, parts: dict[Part, list[str]], start: Path | None) -> Origin:
    return Origin(
        run=run,
        text_sha256=text.digest(parts[run.part]),
        start_sha256=None if start is None else file_digest(start / checkpoints.WEIGHTS),
    )


def _start(run: Run, passages: list[str], start: Path | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if start is None:
        context = run.architecture.max_position_embeddings
        tokenizer: PreTrainedTokenizerBase = train_tokenizer(passages, run.architecture.vocab_size, context)
        return fresh_model(run.architecture, tokenizer, run.training.seed), tokenizer
    # The base as it was saved: what a sub-model starts from is, bit for bit, what it is compared with later.
    model = AutoModelForCausalLM.from_pretrained(start, local_files_only=True, dtype=torch.float32)
    return model, load_tokenizer(start)
