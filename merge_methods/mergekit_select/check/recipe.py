"""Check what a recipe's text alone gives: its keys, method, dtypes and chat template."""

from __future__ import annotations

import difflib
import os
import re
import site
import sys
from collections.abc import Sequence
from pathlib import Path

from mergekit.config import MergeConfiguration
from mergekit.merge_methods import MergeMethod, registered_methods
from mergekit.options import MergeOptions
from pydantic import ValidationError

import mergekit_select.methods
from mergekit_select import _plugins, _startup, kinds
from mergekit_select.check.keys import CLOSE, check_keys
from mergekit_select.check.merge import MergeUnderCheck
from mergekit_select.errors import one_line, place_and_rule
from mergekit_select.findings import Finding, Findings, some
from mergekit_select.inputs.recipe import Recipe, read_recipes
from mergekit_select.planner.internals import chat_template_names
from mergekit_select.planner.plan import unknown_dtypes
from mergekit_select.planner.vocabulary import tokenizer_source


def check_recipe(recipe: Recipe, options: MergeOptions, findings: Findings) -> MergeUnderCheck | None:
    """Add what is wrong with one merge's text; return it, or None where mergekit could not begin with it."""
    found = Findings()
    for key in recipe.duplicates:
        found.add(kinds.DUPLICATE_KEY, key)
    method = _method(recipe.raw.get("merge_method"), found)
    check_keys(recipe.raw, method, found)
    config = _parse(recipe, found)
    if config is not None:
        _dtypes(config, found)
        _chat_template(config, found)
        if tokenizer_source(config) == "union":
            place = "tokenizer.source" if config.tokenizer else "tokenizer_source"
            found.add(kinds.TOKENIZER_UNION, place, "union")
    findings += [one if recipe.name is None else one.within(recipe.name) for one in found]
    if config is None or method is None:
        return None
    return MergeUnderCheck(recipe.name, config, method, options)


def ignored_keys(path: str | Path) -> Sequence[Finding]:
    """Return the keys of a recipe file that mergekit ignores; no model is looked at.

    Raises:
        RecipeError: The file cannot be read as a recipe.
    """
    methods = {method.spec.name: method for method in registered_methods()}
    found = Findings()
    for recipe in read_recipes(path):
        within = Findings()
        check_keys(recipe.raw, methods.get(str(recipe.raw.get("merge_method"))), within)
        found += [one if recipe.name is None else one.within(recipe.name) for one in within]
    return [one for one in found if one.kind == kinds.KEY_IGNORED.name]


def _parse(recipe: Recipe, findings: Findings) -> MergeConfiguration | None:
    try:
        return MergeConfiguration.model_validate(recipe.raw)
    except ValidationError as error:
        for problem in error.errors():
            (place, rule), value = place_and_rule(problem), problem["input"]
            told = {"problem": rule, "remedy": _shape(place, value)}
            findings.add(kinds.RECIPE_INVALID, place or "recipe", repr(value)[:80], **told)
    except Exception as error:  # mergekit's validators raise RuntimeError, which pydantic passes on
        findings.add(kinds.RECIPE_REFUSED, "recipe", problem=one_line(error))
    return None


def _shape(place: str, value: object) -> str:
    """Say how to write what has another shape than mergekit reads."""
    if re.fullmatch(r"(.*\.)?models\[\d+\]", place) and isinstance(value, str):
        return f"write - model: {one_line(value)}"
    if re.fullmatch(r"(.*\.)?models", place) and isinstance(value, dict):
        return "begin the entry of each model with - model:"
    return "write it as https://github.com/arcee-ai/mergekit describes recipes"


def _method(name: object, findings: Findings) -> MergeMethod | None:
    if name is not None and not isinstance(name, str):
        return None  # the recipe's shape is reported as a whole
    methods = {method.spec.name: method for method in registered_methods()}
    if name not in methods:
        near = difflib.get_close_matches(str(name), methods, 1, CLOSE)
        broken = f" Plugins that failed: {some(_plugins.problems())}." if _plugins.problems() else ""
        choice = f"write {near[0]}" if near else f"choose one of {', '.join(sorted(methods))}"
        findings.add(kinds.METHOD_UNKNOWN, "merge_method", repr(name), broken=broken, choice=choice)
        return None
    own = getattr(mergekit_select.methods, str(name), None) is methods[str(name)]
    if own and (why := why_inactive()):
        findings.add(kinds.PLUGIN_INACTIVE, "merge_method", name, why=why)
    return methods[str(name)]


def why_inactive() -> str | None:
    """Say why the startup file does not register the methods in processes like this one, or None if it does."""
    if _startup.turned_off():
        return f"{_startup.SWITCH}={os.environ[_startup.SWITCH]} turns it off"
    if sys.flags.no_site:
        return "Python runs without site-packages (-S)"
    folders = [*site.getsitepackages(), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])]
    file = "mergekit_select.start" if sys.version_info >= (3, 15) else "mergekit_select.pth"
    if not any(Path(folder, file).exists() for folder in folders):
        return f"no {file} in {' or '.join(folders)}"
    return None


def _dtypes(config: MergeConfiguration, findings: Findings) -> None:
    for key, name in unknown_dtypes(config):
        findings.add(kinds.DTYPE_UNKNOWN, key, name, key=key)


def _chat_template(config: MergeConfiguration, findings: Findings) -> None:
    template = config.chat_template
    if not template or template == "auto" or (len(template) >= 20 and "{" in template):
        return
    known = chat_template_names()
    if template not in known:
        effect = (
            "it would fail after the merge"
            if tokenizer_source(config)
            else "the merge would log an error, and leave an output without a tokenizer"
        )
        findings.add(kinds.CHAT_TEMPLATE, "chat_template", template, effect=effect, known=", ".join(known))
