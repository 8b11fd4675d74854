"""What a stranger found who set out to make ``merge`` end with 0 over a folder that is not what the recipe gives."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergekit_select.errors import PlanError, UnreadableError
from mergekit_select.execution import finish as end
from mergekit_select.execution import work
from mergekit_select.execution.local import merge
from mergekit_select.execution.request import Request
from mergekit_select.verification import verify
from tests.support.adapters import train_adapters
from tests.support.checkpoints import changed, edit_json
from tests.support.commands import invoke, one_line
from tests.support.models import Family, small_family, write_tokenizer
from tests.support.recipes import SELECTION, recipe, written

SHARDS: dict[str, Any] = {"out_shard_size": 8_000}


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return small_family().copied(tmp_path / "models")


def begun(file: Path, out: Path, share: tuple[int, int] | None = None, **options: Any) -> None:
    merge(Request(str(file), str(out), options, share), jobs=1)


def moved(tensors: dict[str, torch.Tensor]) -> None:
    tensors.update({name: tensor + 1 for name, tensor in tensors.items()})


def emptied(out: Path) -> None:
    """As ``rm -r out/*`` does, which leaves what begins with a dot."""
    for path in out.iterdir():
        if not path.name.startswith("."):
            path.unlink()


def other_weights(out: Path) -> None:
    changed(out, moved)


def other_weights_of_the_old_time(out: Path) -> None:
    times = (out / "model.safetensors").stat()
    changed(out, moved)
    os.utime(out / "model.safetensors", ns=(times.st_atime_ns, times.st_mtime_ns))


def cut_weights(out: Path) -> None:
    os.truncate(out / "model.safetensors", 1000)


def other_config(out: Path) -> None:
    edit_json(out / "config.json", rms_norm_eps=1.0)


def no_tokenizer(out: Path) -> None:
    (out / "tokenizer.json").unlink()


def more_files(out: Path) -> None:
    (out / "adapter_config.json").write_text("{}")


CHANGES = [emptied, other_weights, other_weights_of_the_old_time, cut_weights, other_config, no_tokenizer, more_files]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_finished_folder_that_is_another_by_now(
    change: Callable[[Path], None], family: Family, tmp_path: Path
) -> None:
    file, out = written(tmp_path / "r.yml", family.recipe()), tmp_path / "out"
    begun(file, out)
    change(out)
    one_line(invoke("merge", file, out, "--jobs", 1, "--quiet"), 2, str(out))
    assert not (out / "merge_provenance.json").exists()


def test_a_finished_folder_whose_tensors_are_damaged_where_no_time_tells(family: Family, tmp_path: Path) -> None:
    file, out = written(tmp_path / "r.yml", family.recipe()), tmp_path / "out"
    begun(file, out)
    changed(out, moved)
    kept = (out / ".merge" / "files.json").read_text()
    status = (out / "model.safetensors").stat()
    edit_json(
        out / ".merge" / "files.json",
        weights={"model.safetensors": [status.st_size, status.st_mtime_ns, status.st_ctime_ns]},
    )
    assert kept != (out / ".merge" / "files.json").read_text()
    begun(file, out)  # as after a disk that lost a bit
    with pytest.raises(UnreadableError, match=r"model\.safetensors must be as the merge left it, and is not"):
        merge(Request(str(file), str(out), {}), jobs=1, rehash=True)


def test_a_finished_folder_that_was_copied_or_whose_card_was_written_anew(family: Family, tmp_path: Path) -> None:
    file, out = written(tmp_path / "r.yml", family.recipe()), tmp_path / "out"
    begun(file, out)
    shutil.copytree(out, tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("mine")
    begun(file, tmp_path / "copy")
    assert (tmp_path / "copy" / "README.md").read_text() == "mine"


def test_parts_of_a_plan_that_is_not_there_any_more(family: Family, tmp_path: Path) -> None:
    """Whoever reads that the folder is of another plan may remove the plan."""
    file, out = written(tmp_path / "r.yml", family.recipe()), tmp_path / "out"
    begun(file, out, (1, 2), **SHARDS)
    changed(family.subs[0], moved)
    with pytest.raises(PlanError, match="holds an unfinished merge of another plan"):
        begun(file, out, **SHARDS)
    (out / ".merge" / "plan.json").unlink()
    begun(file, out, **SHARDS)
    assert verify(out).same


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "chat_template.jinja", "modeling_llama.py", "custom_generate/generate.py"]
)
def test_files_that_would_be_loaded_with_the_model(name: str, family: Family, tmp_path: Path) -> None:
    file, out = written(tmp_path / "r.yml", family.recipe()), tmp_path / "out"
    (out / name).parent.mkdir(parents=True)
    (out / name).write_text("x")
    with pytest.raises(PlanError, match="must hold no other model, and holds "):
        begun(file, out)
    (out / name).unlink()
    begun(file, out, (1, 2), **SHARDS)
    (out / name).write_text("x")  # while it is under way
    with pytest.raises(PlanError, match="must hold no other model, and holds "):
        begun(file, out, **SHARDS)
    assert not (out / "config.json").exists()
    (out / name).unlink()
    begun(file, out, **SHARDS)
    assert verify(out).same


def test_what_an_interrupted_end_took_from_another_model(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a base mergekit takes any model's config and tokenizer; the next process may take another's."""
    for number, sub in enumerate(family.subs):
        write_tokenizer(sub, 64, rotated=number)
    text = family.recipe("linear", parameters={"weight": 1})
    del text["base_model"]
    file, out = written(tmp_path / "r.yml", text), tmp_path / "out"

    def of(model: Path) -> Callable[..., None]:
        def finish_folder(_engine: Any, folder: Path, _name: str, content: str) -> None:
            for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
                if (model / name).exists():
                    shutil.copy(model / name, folder)
            (folder / "mergekit_config.yml").write_text(content)

        return finish_folder

    (family.subs[0] / "chat_template.jinja").write_text("x")
    monkeypatch.setattr(end, "finish_folder", of(family.subs[0]))

    def killed(path: Path, target: Path, do: Any = Path.replace) -> Path:
        if target.name == "config.json":
            raise KeyboardInterrupt
        result: Path = do(path, target)
        return result

    with monkeypatch.context() as context:
        context.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            begun(file, out)
    assert (out / "chat_template.jinja").exists()
    monkeypatch.setattr(end, "finish_folder", of(family.subs[1]))
    begun(file, out)
    assert not (out / "chat_template.jinja").exists()


def test_an_adapter_that_was_trained_on_since_its_merge_was_cached(family: Family, tmp_path: Path) -> None:
    (adapter,) = train_adapters(family.base, tmp_path, 1)
    text = recipe(SELECTION, family.base, [f"{family.base}+{adapter}", family.subs[0]])
    file = written(tmp_path / "r.yml", text)
    cache: dict[str, Any] = {"lora_merge_cache": str(tmp_path / "cache")}
    begun(file, tmp_path / "first", **cache)
    begun(file, tmp_path / "first", **cache)  # finds it finished
    stored = adapter / "adapter_model.safetensors"
    times = stored.stat()
    save_file({name: tensor + 1 for name, tensor in load_file(stored).items()}, stored, metadata={"format": "pt"})
    os.utime(stored, ns=(times.st_atime_ns, times.st_mtime_ns))
    begun(file, tmp_path / "second", **cache)
    assert verify(tmp_path / "second").same
    begun(file, tmp_path / "third", lora_merge_dtype="float16", **cache)
    assert len([*(tmp_path / "cache").iterdir()]) == 3


def test_a_merge_that_was_killed_while_it_merged_an_adapter(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mergekit makes the adapter's folder before it merges, and takes a folder that is there for a merge."""
    import peft

    (adapter,) = train_adapters(family.base, tmp_path, 1)
    file = written(tmp_path / "r.yml", recipe(SELECTION, family.base, [f"{family.base}+{adapter}", family.subs[0]]))
    cache: dict[str, Any] = {"lora_merge_cache": str(tmp_path / "cache")}

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(peft.PeftModel, "from_pretrained", killed)
        with pytest.raises(KeyboardInterrupt):
            begun(file, tmp_path / "out", **cache)
    begun(file, tmp_path / "out", **cache)
    assert verify(tmp_path / "out").same
    (kept,) = (tmp_path / "cache").iterdir()
    assert not (kept / ".unfinished").exists()


def test_a_tokenizer_of_a_model_that_is_not_merged_changes_between_two_shares(family: Family, tmp_path: Path) -> None:
    """Parts of two vocabularies would be one model; a template that changes after the end would not be the merge's."""
    tokenizer = tmp_path / "tok"
    write_tokenizer(tokenizer)
    aligned = {
        **recipe("linear", None, family.subs[:2], parameters={"weight": 1}),
        "tokenizer": {"source": str(tokenizer)},
    }
    file, out = written(tmp_path / "r.yml", aligned), tmp_path / "out"
    half = ("merge", file, out, "--jobs", 1, "--out-shard-size", 8000, "--shard", "1/2", "--quiet")
    assert invoke(*half).exit_code == 0
    edit_json(tokenizer / "tokenizer_config.json", padding_side="left")
    one_line(invoke(*half), 1, "tok/tokenizer_config.json has changed since")


def test_a_chat_template_that_changes_after_the_end(family: Family, tmp_path: Path) -> None:
    (family.base / "chat_template.jinja").write_text("old")
    file, out = written(tmp_path / "r.yml", family.recipe()), tmp_path / "out"
    begun(file, out)
    (family.base / "chat_template.jinja").write_text("new")
    with pytest.raises(PlanError, match=r"chat_template\.jinja has changed since"):
        begun(file, out)


def test_an_intermediate_merge_that_is_another_by_now(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    one, two, three = map(str, family.subs)
    average = {"name": "average", **recipe("linear", None, [one, two], parameters={"weight": 1})}
    file = written(Path("m.yml"), average, recipe(SELECTION, family.base, ["average", three]))
    command = ("merge", file, "out", "-I", "./parts", "--jobs", 1, "--quiet")
    assert invoke(*command).exit_code == 0
    shutil.rmtree("out")
    changed(tmp_path / "parts" / "average", moved)
    one_line(invoke(*command), 2, "parts/average was finished, and model.safetensors must be as the merge left it")
    assert not Path("out", "config.json").exists()


def test_an_input_that_changes_after_the_last_tensor(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record would be of inputs that no tensor was computed from."""
    file, out = written(tmp_path / "r.yml", family.recipe()), tmp_path / "out"

    def computed(job: Any, parts: Any, progress: Any = None, do: Any = work.work) -> None:
        do(job, parts)
        changed(family.subs[0], moved)

    monkeypatch.setattr(work, "work", computed)
    with pytest.raises(UnreadableError, match="has changed during the merge"):
        begun(file, out)
    assert not (out / "config.json").exists()
