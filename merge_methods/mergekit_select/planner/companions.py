"""The files that mergekit writes beside the tensors: config, tokenizer, model card and recipe, by its own functions."""

from __future__ import annotations

import logging
from pathlib import Path

from mergekit.card import generate_card

from mergekit_select.errors import PlanError, one_line
from mergekit_select.inputs.files import RECIPE
from mergekit_select.planner.engine import Engine, at
from mergekit_select.planner.internals import resize_vocabulary, stored_config, write_companions

_log = logging.getLogger(__name__)


def require_card(engine: Engine, recipe: str) -> None:
    """Make a model card and drop it, before the tensors are computed: mergekit asks the hub of paths with one slash.

    Raises:
        PlanError: mergekit cannot make one.
    """
    if not engine.plan.options.write_model_card:
        return
    try:
        generate_card(config=engine.plan.config, config_yaml=recipe, name="")
    except Exception as error:  # whatever the network layers raise
        raise PlanError(
            f"mergekit cannot write the model card: {one_line(error)}; write ./ before paths of local models, "
            f"or give --no-write-model-card"
        ) from error


def finish_folder(engine: Engine, folder: Path, name: str, recipe: str) -> None:
    """Write what ``mergekit.merge.run_merge`` writes after the tensors, in its order.

    Args:
        engine: The merge.
        folder: Where to; it exists.
        name: The last part of the output's path, which titles the model card.
        recipe: The recipe's text, stored verbatim.

    Raises:
        MergekitSelectError: mergekit fails at it, or the system refuses to copy the tokenizer.
    """
    plan = engine.plan
    config, options = plan.config, plan.options
    with at("writing config, tokenizer and model card"):
        settings = stored_config(config, plan.architecture, options.trust_remote_code)
        tokenizer = None if plan.tokenizer is None else engine.tokenizer(plan.tokenizer).tokenizer
        if tokenizer is not None:
            resize_vocabulary(settings, plan.architecture, tokenizer, config)
        settings.save_pretrained(folder)
        if options.write_model_card:
            card = generate_card(config=config, config_yaml=recipe, name=name)
            (folder / "README.md").write_text(card, encoding="utf-8")
            (folder / RECIPE).write_text(recipe, encoding="utf-8")
        failure = write_companions(config, plan.architecture, options, tokenizer, folder)
        if isinstance(failure, OSError) and failure.errno is not None:  # of the system, such as a full disk
            raise failure
        if failure is not None:  # as mergekit: a merge without a tokenizer is one
            _log.error("Failed to copy the tokenizer (%s); the merge is whole, copy it from elsewhere", failure)
