"""A recipe that calls its models otherwise: at their commits, or where they lie now."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import yaml
from mergekit.common import ModelPath, ModelReference

from mergekit_select.errors import RecipeError
from mergekit_select.inputs.references import with_references
from mergekit_select.provenance.parents import configurations


def renamed(text: str, place: str, names: Mapping[str, str]) -> str:
    """Return a recipe's text with models called otherwise; comments and layout stay where that can be done.

    Args:
        text: The recipe.
        place: What messages call it.
        names: New name of a model or adapter by its old one.
    """
    if not any(old != new for old, new in names.items()):
        return text

    def change(reference: ModelReference) -> ModelReference:
        lora = None if reference.lora is None else names.get(str(reference.lora), str(reference.lora))
        model = names.get(str(reference.model), str(reference.model))
        return reference.model_copy(
            update={
                "model": ModelPath.model_validate(model),
                "lora": None if lora is None else ModelPath.model_validate(lora),
            }
        )

    wanted = [(name, with_references(config, change)) for name, config in configurations(text, place)]
    edited = text
    for node in sorted(_scalars(text), key=lambda node: node.start_mark.index, reverse=True):
        value = "+".join(names.get(part, part) for part in node.value.split("+"))
        if value != node.value:
            quoted = f"{node.style}{value}{node.style}" if node.style in ("'", '"') else value
            edited = edited[: node.start_mark.index] + quoted + edited[node.end_mark.index :]
    try:
        if configurations(edited, place) == wanted:
            return edited
    except RecipeError:
        pass  # a reference in another form than text: write the whole recipe anew
    documents = [({} if name is None else {"name": name}) | yaml.safe_load(config.to_yaml()) for name, config in wanted]
    return yaml.safe_dump_all(documents, sort_keys=False)


def _scalars(text: str) -> Iterator[yaml.ScalarNode]:
    """Yield the scalars of a recipe that are no keys."""
    nodes: list[yaml.Node] = [node for node in yaml.compose_all(text, Loader=yaml.SafeLoader) if node is not None]
    visited: set[int] = set()
    while nodes:
        node = nodes.pop()
        if id(node) in visited:
            continue
        visited.add(id(node))
        if isinstance(node, yaml.ScalarNode):
            yield node
        elif isinstance(node, yaml.MappingNode):
            nodes += [value for _, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            nodes += node.value
