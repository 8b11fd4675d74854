"""Options that the commands share: mergekit's merge options under their own names, and those of every report.

The table below repeats a part of ``mergekit.options``, since importing that takes seconds and ``--help`` should not;
a test compares the two.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from mergekit.options import MergeOptions

_Command = TypeVar("_Command", bound=Callable[..., Any])


class _Size(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic from click 8.4 on only
    """A size as mergekit reads it: digits, or a number followed by k, m or b."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number of bytes."""
        if isinstance(value, int):
            return value
        from mergekit.common import parse_kmb

        try:
            return int(parse_kmb(value))
        except (ValueError, IndexError):  # IndexError: nothing at all
            self.fail(f"{value!r} is not a size; write one such as 5B, 500M or 1000000", param, ctx)


# field of mergekit.options.MergeOptions: type, default, help
MERGE_OPTIONS: dict[str, tuple[Any, Any, str]] = {
    "allow_crimes": (bool, False, "Allow mixing architectures"),
    "unsafe_truncate_embeddings": (
        bool,
        False,
        "UNSAFE: discard trailing embedding rows to match the smallest vocabulary",
    ),
    "transformers_cache": (str, None, "Override storage path for downloaded models"),
    "lora_merge_cache": (str, None, "Path to store merged LORA models"),
    "lora_merge_dtype": (str, None, "Override dtype when applying LoRAs"),
    "out_shard_size": (_Size(), 5_000_000_000, "Size of an output shard  [default: 5B]"),
    "copy_tokenizer": (bool, True, "Copy a tokenizer to the output"),
    "trust_remote_code": (bool, False, "Trust remote code from huggingface repos (danger)"),
    "write_model_card": (bool, True, "Output README.md containing details of the merge"),
    "safe_serialization": (bool, True, "Save output in safetensors"),
    "lazy_unpickle": (bool, False, "Experimental lazy unpickler for lower memory usage"),
    "device": (str, None, "Perform matrix arithmetic on specified device"),
    "read_to_gpu": (bool, False, "Read model weights directly to accelerator"),
    "random_seed": (int, None, "Seed for reproducible use of randomized merge methods"),
    "num_threads": (int, None, "Number of threads to use for parallel CPU operations"),
}


def merge_options(*fields: str, built: bool = True) -> Callable[[_Command], _Command]:
    """Give a command these of mergekit's merge options; it receives them as ``merge_options``, a MergeOptions.

    Args:
        fields: Names of MergeOptions fields that are in ``MERGE_OPTIONS``.
        built: False for a dictionary instead, for a command that has to do something before torch is imported.
    """

    def decorate(function: _Command) -> _Command:
        @functools.wraps(function)
        def command(*args: Any, **values: Any) -> Any:
            given = {field: values.pop(field) for field in fields}
            _require_numbers(given)
            return function(*args, merge_options=_build(given) if built else given, **values)

        decorated: Any = command
        for field in reversed(fields):
            kind, default, text = MERGE_OPTIONS[field]
            name = field.replace("_", "-")
            declaration = [f"--{name}/--no-{name}"] if kind is bool else [f"--{name}"]
            if field == "num_threads":
                declaration.append("-j")
            shown = default is not None and field != "out_shard_size"
            decorated = click.option(*declaration, type=kind, default=default, help=text, show_default=shown)(decorated)
        return decorated  # type: ignore[no-any-return]  # the function, wrapped

    return decorate


def _require_numbers(given: dict[str, Any]) -> None:
    """Refuse what torch would end with an error of its own."""
    for field, least, most in (("num_threads", 1, 1 << 31), ("random_seed", -(1 << 63), 1 << 63)):
        value = given.get(field)
        if value is not None and not least <= value < most:
            hint = f"--{field.replace('_', '-')}"
            raise click.BadParameter(f"must be at least {least} and less than {most}, got {value}", param_hint=hint)


def _build(given: dict[str, Any]) -> MergeOptions:
    from mergekit.options import MergeOptions

    return MergeOptions(**given)


def report_options(function: _Command) -> _Command:
    """Give a command ``--json`` and ``--quiet``; it receives ``as_json`` and ``quiet``."""
    quiet = click.option("--quiet", is_flag=True, help="No progress bar")
    as_json = click.option("--json", "as_json", is_flag=True, help="Print the report as JSON, with a schema version")
    return as_json(quiet(function))


strict_option = click.option("--strict", is_flag=True, help="Exit with 1 on warnings too")


def replay_options(*more: str) -> Callable[[_Command], _Command]:
    """Give a command ``merge_options`` from those of mergekit-yaml's options that change a tensor, and these."""
    return merge_options(
        "allow_crimes",
        "unsafe_truncate_embeddings",
        "transformers_cache",
        "lora_merge_cache",
        "lora_merge_dtype",
        *more,
        "trust_remote_code",
        "lazy_unpickle",
        "device",
        "read_to_gpu",
        "random_seed",
        "num_threads",
    )


def locked_options(function: _Command) -> _Command:
    """Give a command ``merge_options`` from those of mergekit-yaml's options that a lock records."""
    return merge_options(
        "allow_crimes",
        "unsafe_truncate_embeddings",
        "transformers_cache",
        "lora_merge_dtype",
        "out_shard_size",
        "copy_tokenizer",
        "trust_remote_code",
        "safe_serialization",
        "random_seed",
    )(function)


def given_options() -> set[str]:
    """Return the names of the options that the command line gives, in a command."""
    context = click.get_current_context()
    source = click.core.ParameterSource.DEFAULT
    return {name for name in context.params if context.get_parameter_source(name) is not source}


def trust_options(function: _Command) -> _Command:
    """Give a command options that say whose signature is expected; it receives ``trust``, a Trust."""

    @functools.wraps(function)
    def command(
        *args: Any, public_key: str | None, identity: str | None, identity_provider: str | None, **values: Any
    ) -> Any:
        from mergekit_select.provenance.signing import Trust

        if (identity is None) != (identity_provider is None) or (public_key and identity):
            raise click.UsageError("give --public-key, or both of --identity and --identity-provider")
        key = None if public_key is None else Path(public_key)
        return function(*args, trust=Trust(key, identity, identity_provider), **values)

    decorated: Any = command
    for name, metavar, text in (
        ("identity-provider", "URL", "Who vouches for that identity, such as https://accounts.google.com"),
        ("identity", "WHO", "Expect a signature made with Sigstore as WHO, such as an e-mail address"),
        ("public-key", "FILE", "Expect a signature that this public key verifies"),
    ):
        decorated = click.option(f"--{name}", metavar=metavar, help=text)(decorated)
    return decorated  # type: ignore[no-any-return]  # the function, wrapped


def parse_maps(_context: click.Context, _option: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """Read the values of ``--map``."""
    result: dict[str, str] = {}
    for value in values:
        old, separator, new = value.partition("=")
        if not (old and separator and new):
            raise click.BadParameter(f"must be OLD=NEW, got {value!r}")
        if result.setdefault(old, new) != new:
            raise click.BadParameter(f"maps {old!r} twice, to {result[old]!r} and {new!r}")
    return result


map_option = click.option(
    "--map",
    "locations",
    multiple=True,
    metavar="OLD=NEW",
    callback=parse_maps,
    help="A model, or a folder of models, that the recipe calls OLD lies at NEW; repeatable",
)


jobs_option = click.option(
    "--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Processes that read and compute"
)


def apply_threads(options: MergeOptions) -> None:
    """Let torch use as many threads as asked for; mergekit's own step fails where torch has computed."""
    if options.num_threads is not None:
        import torch

        torch.set_num_threads(options.num_threads)
