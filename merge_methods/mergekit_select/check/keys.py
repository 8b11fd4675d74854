"""Check a recipe's keys against mergekit's own models of a recipe, which silently ignore unknown ones."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import mergekit.tokenizer.config as tokenizer_schema
from mergekit import config as schema
from mergekit.common import ModelPath, ModelReference
from mergekit.merge_methods import MergeMethod, ParameterScope, registered_methods
from pydantic import BaseModel

from mergekit_select import kinds
from mergekit_select.findings import Findings
from mergekit_select.methods import OWN

CLOSE = 0.75  # difflib's ratio at and above which an unknown name is taken for a misspelt one


def check_keys(raw: Mapping[str, Any], method: MergeMethod | None, findings: Findings) -> None:
    """Add the keys of one merge that mergekit, or its method, does not know."""
    _Keys(method, findings).config(raw)


class _Keys:
    """Walks a recipe as mergekit's models describe it."""

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
        self._weight_of_all(raw)
        self._base_averaged(raw)
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

    def _base_averaged(self, raw: Mapping[str, Any]) -> None:
        """Find a base that is averaged with the models, although nobody listed it among them."""
        models = {_as_text(_get(entry, "model")) for _, entry in _numbered(raw.get("models"))}
        if (
            self.method is not None
            and self.method.spec.name == "linear"
            and models
            and self.base not in {None, *models}
        ):
            self.findings.add(kinds.BASE_AVERAGED, "base_model", self.base)

    def _input(self, raw: object, model: type[BaseModel], place: str, base: str | None) -> None:
        self._known(raw, model, place)
        self._reference(_get(raw, "model"), f"{place}model")
        parameters = _get(raw, "parameters")
        self._parameters(parameters, f"{place}parameters", True)
        if base is None or _as_text(_get(raw, "model")) != base or self.method is None:
            return
        if self.method.spec.name in OWN:
            self.findings.add(kinds.BASE_LISTED, f"{place}model", base)
        for parameter in self.method.spec.parameters:
            name = parameter.name
            if parameter.scope is ParameterScope.NON_BASE and name in _mapping(parameters):
                value = _get(parameters, name)
                self.findings.add(kinds.BASE_PARAMETER_IGNORED, f"{place}parameters.{name}", value, name=name)

    def _weight_of_all(self, raw: Mapping[str, Any]) -> None:
        """Find a list of weights that was meant to have one for each model."""
        weight = _get(raw.get("parameters"), "weight")
        if self.method is None or self.method.spec.name not in OWN or not isinstance(weight, list):
            return
        if any(isinstance(entry, dict) for entry in weight):  # filters
            return
        sliced = [_get(output, "sources") for _, output in _numbered(raw.get("slices"))]
        inputs = [entry for entries in (raw.get("models"), *sliced) for _, entry in _numbered(entries)]
        if not any("weight" in _mapping(_get(entry, "parameters")) for entry in inputs):
            self.findings.add(kinds.WEIGHT_OF_ALL, "parameters.weight", weight)

    def _reference(self, raw: object, place: str) -> None:
        self._known(raw, ModelReference, f"{place}.")
        for part in ("model", "lora"):
            self._known(_get(raw, part), ModelPath, f"{place}.{part}.")

    def _known(self, raw: object, model: type[BaseModel], place: str) -> None:
        for key, value in _items(raw):
            if key not in model.model_fields:
                self._unknown(f"{place}{key}", str(key), value, model.model_fields)

    def _parameters(self, raw: object, place: str, of_input: bool) -> None:
        if self.method is None:
            return
        for name, value in _items(raw):
            here = f"{place}.{name}"
            if name not in self.shared | self.per_input:
                self._unknown(here, str(name), value, self.shared | self.per_input)
            elif of_input and name in self.shared:
                self.findings.add(kinds.KEY_MISPLACED, here, value, key=name)
            elif isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
                for number, entry in _numbered(value):
                    self._known(entry, schema.ConditionalParameter, f"{here}[{number}].")

    def _unknown(self, place: str, key: str, value: object, known: Iterable[str]) -> None:
        if key in self.shared | self.per_input:
            where = f"{place.rpartition('.')[0]}.parameters" if key in self.per_input else "the recipe's parameters"
            self.findings.add(kinds.KEY_NOT_A_PARAMETER, place, value, key=key, where=where.removeprefix("."))
            return
        near = difflib.get_close_matches(key, list(known), 1, CLOSE)
        elsewhere = any(key == p.name for method in registered_methods() for p in method.spec.parameters)
        # Recipes often carry parameters of other methods on, which does no harm.
        if near and not elsewhere:
            self.findings.add(kinds.KEY_MISSPELT, place, value, key=key, near=near[0])
        else:
            self.findings.add(kinds.KEY_IGNORED, place, value, key=key)


def _as_text(raw: object) -> str | None:
    if raw is None:
        return None
    try:
        return str(ModelReference.model_validate(raw))
    except Exception:  # reported with the recipe's shape
        return str(raw)


def _mapping(raw: object) -> Mapping[Any, Any]:
    return raw if isinstance(raw, dict) else {}


def _items(raw: object) -> Iterable[tuple[Any, Any]]:
    return _mapping(raw).items()


def _get(raw: object, key: Any) -> Any:
    return _mapping(raw).get(key)


def _numbered(raw: object) -> Iterable[tuple[int, Any]]:
    return enumerate(raw if isinstance(raw, list) else [])
