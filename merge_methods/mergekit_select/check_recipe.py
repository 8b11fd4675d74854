"""Findings that a recipe's text alone gives: its keys, method, parameters, dtypes and names of models."""

from __future__ import annotations

import difflib
import importlib.resources
import os
import site
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import mergekit.tokenizer.config as tokenizer_schema
from mergekit import config as schema
from mergekit._data import chat_templates
from mergekit.common import ModelPath, ModelReference, dtype_from_name
from mergekit.config import MergeConfiguration
from mergekit.merge_methods import MergeMethod, ParameterScope, registered_methods
from pydantic import BaseModel, ValidationError

import mergekit_select.methods
from mergekit_select import _plugins, _startup
from mergekit_select.findings import Findings, one_line, some

CLOSE = 0.75  # difflib's ratio from which an unknown key is taken for a misspelt one
OWN_METHODS = ("parameter_selection", "parameter_selection_resampling")


def check_recipe(raw: Mapping[str, Any], findings: Findings) -> tuple[MergeConfiguration, MergeMethod] | None:
    """Add what is wrong with one merge's text; return it parsed, or None where mergekit could not begin with it."""
    method = _method(raw.get("merge_method"), findings)
    _Keys(method, findings).config(raw)
    try:
        config = MergeConfiguration.model_validate(raw)
    except ValidationError as error:
        for problem in error.errors():
            place = ".".join(str(part) for part in problem["loc"]) or "recipe"
            remedy = "see mergekit's description of its recipes"
            findings.error("recipe-invalid", place, repr(problem["input"])[:80], problem["msg"], remedy)
        return None
    except Exception as error:  # mergekit's validators raise RuntimeError, which pydantic passes on
        findings.error("recipe-invalid", "recipe", "", one_line(error), "correct it")
        return None
    _dtypes(config, findings)
    _chat_template(config, findings)
    if (config.tokenizer_source or (config.tokenizer and config.tokenizer.source)) == "union":
        findings.warning(
            "tokenizer-union",
            "tokenizer.source" if config.tokenizer else "tokenizer_source",
            "union",
            "mergekit orders a union vocabulary by a set of models, whose order changes from run to run; nothing fixes "
            "it before Python 3.12, and PYTHONHASHSEED does from there on",
            "name one model, or base, as the source",
        )
    return None if method is None else (config, method)


def _method(name: object, findings: Findings) -> MergeMethod | None:
    if name is not None and not isinstance(name, str):
        return None  # the recipe's shape is reported as a whole
    methods = {method.spec.name: method for method in registered_methods()}
    if name not in methods:
        near = difflib.get_close_matches(str(name), methods, 1, CLOSE)
        broken = f" Plugins that failed: {some(_plugins.problems())}." if _plugins.problems() else ""
        findings.error(
            "unknown-method",
            "merge_method",
            repr(name),
            f"merge_method must be a method that is registered with mergekit.{broken}",
            f"write {near[0]}" if near else f"choose one of {', '.join(sorted(methods))}",
        )
        return None
    own = getattr(mergekit_select.methods, str(name), None) is methods[str(name)]
    if own and (why := why_inactive()):
        findings.error(
            "plugin-inactive",
            "merge_method",
            str(name),
            f"mergekit-yaml will not know the method here: {why}",
            "run `mergekit-select run yaml RECIPE OUT` instead, or install mergekit-select with pip in site-packages",
        )
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


class _Keys:
    """Walk a recipe as mergekit's models describe it, and add what they do not know."""

    def __init__(self, method: MergeMethod | None, findings: Findings) -> None:
        self.method = method
        self.findings = findings
        parameters = method.spec.parameters if method else ()
        self.shared = {parameter.name for parameter in parameters if parameter.scope is ParameterScope.SHARED}
        self.per_input = {parameter.name for parameter in parameters} - self.shared
        self.base: str | None = None

    def config(self, raw: Mapping[str, Any]) -> None:
        self._known(raw, schema.MergeConfiguration, "")
        self.base = _as_text(raw.get("base_model"))
        self._reference(raw.get("base_model"), "base_model")
        self._parameters(raw.get("parameters"), "parameters", False)
        self._module(raw, "")
        for name, module in _items(raw.get("modules")):
            place = f"modules.{name}."
            self._known(module, schema.OutputModuleDefinition, place)
            self._parameters(_get(module, "parameters"), f"{place}parameters", False)
            self._module(module, place)
        tokenizer = raw.get("tokenizer")
        self._known(tokenizer, tokenizer_schema.TokenizerConfig, "tokenizer.")
        for token, settings in _items(_get(tokenizer, "tokens")):
            self._known(settings, tokenizer_schema.TokenEmbeddingConfig, f"tokenizer.tokens.{token}.")

    def _module(self, raw: object, place: str) -> None:
        for number, model in _numbered(_get(raw, "models")):
            self._input(model, schema.InputModelDefinition, f"{place}models[{number}].", self.base)
        for number, output in _numbered(_get(raw, "slices")):
            here = f"{place}slices[{number}]."
            self._known(output, schema.OutputSliceDefinition, here)
            self._parameters(_get(output, "parameters"), f"{here}parameters", False)
            base = _as_text(_get(output, "base_model")) or self.base
            for source_number, source in _numbered(_get(output, "sources")):
                self._input(source, schema.InputSliceDefinition, f"{here}sources[{source_number}].", base)

    def _input(self, raw: object, model: type[BaseModel], place: str, base: str | None) -> None:
        self._known(raw, model, place)
        self._reference(_get(raw, "model"), f"{place}model")
        parameters = _get(raw, "parameters")
        self._parameters(parameters, f"{place}parameters", True)
        if base is None or _as_text(_get(raw, "model")) != base or self.method is None:
            return
        ignored = [p.name for p in self.method.spec.parameters if p.scope is ParameterScope.NON_BASE]
        for name in ignored:
            if name in _mapping(parameters):
                self.findings.warning(
                    "base-parameter-ignored",
                    f"{place}parameters.{name}",
                    _get(parameters, name),
                    f"mergekit ignores {name} for the base model",
                    "remove it",
                )

    def _reference(self, raw: object, place: str) -> None:
        self._known(raw, ModelReference, f"{place}.")
        for part in ("model", "lora"):
            self._known(_get(raw, part), ModelPath, f"{place}.{part}.")

    def _known(self, raw: object, model: type[BaseModel], place: str) -> None:
        for key in _mapping(raw):
            if key not in model.model_fields:
                self._unknown(f"{place}{key}", str(key), _get(raw, key), model.model_fields)

    def _parameters(self, raw: object, place: str, of_input: bool) -> None:
        if self.method is None:
            return
        for name, value in _items(raw):
            here = f"{place}.{name}"
            if name not in self.shared | self.per_input:
                self._unknown(here, str(name), value, self.shared | self.per_input)
            elif of_input and name in self.shared:
                self.findings.error(
                    "unknown-key",
                    here,
                    value,
                    f"{name} is one value for the whole merge, and mergekit ignores it for a single model",
                    "move it to the recipe's parameters",
                )
            elif isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
                for number, entry in _numbered(value):
                    self._known(entry, schema.ConditionalParameter, f"{here}[{number}].")

    def _unknown(self, place: str, key: str, value: object, known: Iterable[str]) -> None:
        near = difflib.get_close_matches(key, list(known), 1, CLOSE)
        elsewhere = any(key == p.name for method in registered_methods() for p in method.spec.parameters)
        # Recipes often carry parameters of other methods on, which does no harm.
        if near and not elsewhere:
            message = f"mergekit does not know the key {key} and ignores it without a word"
            self.findings.error("unknown-key", place, value, message, f"write {near[0]}")
        else:
            message = f"mergekit ignores the key {key} here without a word"
            self.findings.warning("unknown-key", place, value, message, "remove it, or see which method it belongs to")


def _dtypes(config: MergeConfiguration, findings: Findings) -> None:
    for key in ("dtype", "out_dtype"):
        name = getattr(config, key)
        try:
            dtype = dtype_from_name(name)
        except RuntimeError:
            dtype = None
        if name and (dtype is None or not dtype.is_floating_point):
            findings.error(
                "dtype-unknown",
                key,
                name,
                f"{key} must be a floating dtype that mergekit knows; it would fail, or write integers, halfway",
                "write bfloat16, float16, float32 or float64",
            )


def _chat_template(config: MergeConfiguration, findings: Findings) -> None:
    template = config.chat_template
    if not template or template == "auto" or (len(template) >= 20 and "{" in template):
        return
    names = [entry.name.removesuffix(".jinja") for entry in importlib.resources.files(chat_templates).iterdir()]
    if template not in names:
        known = ", ".join(sorted(name for name in names if not name.startswith("_")))
        effect = (
            "it would fail after the merge"
            if config.tokenizer or config.tokenizer_source
            else "the merge would log an error, and leave an output without a tokenizer"
        )
        findings.error(
            "chat-template",
            "chat_template",
            template,
            f"chat_template must be auto, a Jinja template, or one of mergekit's names; {effect}",
            f"choose one of {known}",
        )


def _as_text(raw: object) -> str | None:
    if raw is None:
        return None
    try:
        return str(ModelReference.model_validate(raw))
    except Exception:
        return str(raw)


def _mapping(raw: object) -> Mapping[Any, Any]:
    return raw if isinstance(raw, dict) else {}


def _items(raw: object) -> Iterable[tuple[Any, Any]]:
    return _mapping(raw).items()


def _get(raw: object, key: Any) -> Any:
    return _mapping(raw).get(key)


def _numbered(raw: object) -> Iterable[tuple[int, Any]]:
    return enumerate(raw if isinstance(raw, list) else [])
