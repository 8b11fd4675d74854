"""The command ``recipes``: the recipes that come with the package, each a card in comments above the YAML."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import click

from mergekit_select.cli._output import print_report

_EXAMPLES = """\b
Examples:
  mergekit-select recipes
  mergekit-select recipes show select > select.yml
"""


def _recipes() -> dict[str, Path]:
    """Return the recipes by name: from the installed package, or from the checkout of an editable installation."""
    package = Path(str(files("mergekit_select")))
    installed = package / "recipes"
    folder = installed if installed.is_dir() else package.parents[1] / "recipes"
    return {file.stem: file for file in sorted(folder.glob("*.yml"))}


def _described(name: str, file: Path) -> dict[str, str]:
    """Return a recipe's name, its idea, which is the first line, and its methods in order."""
    import yaml

    text = file.read_text("utf-8")
    methods = dict.fromkeys(recipe["merge_method"] for recipe in yaml.safe_load_all(text))
    return {"name": name, "method": ", ".join(methods), "idea": text.splitlines()[0].removeprefix("# "), "text": text}


_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, with a schema version")


@click.group("recipes", epilog=_EXAMPLES, invoke_without_command=True, subcommand_metavar="[show NAME]")
@_as_json
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """List the recipes that come with the package: name, merge method and idea.

    Each is a file to copy: a card in comments says for whom it is, what it needs, how to run it and what it
    gives; the YAML below is the recipe.
    """
    if ctx.invoked_subcommand is not None:
        return
    recipes = [_described(name, file) for name, file in _recipes().items()]
    widths = [max(len(recipe[key]) for recipe in recipes) + 2 for key in ("name", "method")]
    lines = [f"{r['name']:{widths[0]}}{r['method']:{widths[1]}}{r['idea']}" for r in recipes]
    listed = [{key: recipe[key] for key in ("name", "method", "idea")} for recipe in recipes]
    print_report("recipes", {"recipes": listed}, lines, as_json)


@command.command("show", epilog="Example: mergekit-select recipes show select > select.yml")
@click.argument("name", type=click.Choice([*_recipes()]), metavar="NAME")
@_as_json
def show(name: str, as_json: bool) -> None:
    """Print the recipe NAME with its card, as a file to save and edit."""
    recipe = _described(name, _recipes()[name])
    print_report("recipes show", recipe, recipe["text"].removesuffix("\n").split("\n"), as_json)
