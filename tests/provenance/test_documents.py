"""Locks and records: the schema that is shipped, other people's validators, and files that attack."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from mergekit_select.errors import UnreadableError
from mergekit_select.provenance.statement import BUILD_TYPE, TENSOR_TABLE, BuildDefinition, Statement, TensorTable
from tests.support.commands import invoke, one_line
from tests.support.models import small_family
from tests.support.recipes import merge, recipe, written

SCHEMA = files("mergekit_select.provenance") / "schema.json"


def schema() -> dict[str, Any]:
    """What schema.json must hold; running this module writes it."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A record, a lock, or a table of tensors of mergekit-select, version 1",
        **TypeAdapter(Statement | BuildDefinition | TensorTable).json_schema(),
    }


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recorded")
    family = small_family()
    out = merge(recipe("linear", None, family.subs[:2], parameters={"weight": 1}), folder / "out")
    assert invoke("verify", out, "--record").exit_code == 0
    assert invoke("lock", folder / "out.yml", "--out", folder / "lock.json").exit_code == 0
    return folder


def test_the_schema_is_that_of_the_models() -> None:
    assert json.loads(SCHEMA.read_text("utf-8")) == schema()


@pytest.mark.parametrize("name", ["out/merge_provenance.json", "out/merge_tensors.json", "lock.json"])
def test_files_validate_against_the_schema(recorded: Path, name: str) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    content = json.loads((recorded / name).read_text())
    jsonschema.validate(content, schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({key: value for key, value in content.items() if key[0] not in "besp"}, schema())


def test_the_record_is_accepted_by_in_toto(recorded: Path) -> None:
    parse = pytest.importorskip("google.protobuf.json_format").ParseDict
    statement = pytest.importorskip("in_toto_attestation.v1.statement")
    v1 = pytest.importorskip("in_toto_attestation.v1.statement_pb2")
    provenance = pytest.importorskip("in_toto_attestation.predicates.provenance.v1.provenance_pb2")
    content = json.loads((recorded / "out/merge_provenance.json").read_text())
    statement.Statement.copy_from_pb(parse(content, v1.Statement())).validate()
    found = parse(content["predicate"], provenance.Provenance())
    assert found.build_definition.build_type == content["predicate"]["buildDefinition"]["buildType"]


def _set(*path: str | int) -> Callable[[Any], Callable[[dict[str, Any]], None]]:
    def to(value: Any) -> Callable[[dict[str, Any]], None]:
        def change(content: dict[str, Any]) -> None:
            place: Any = content
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = value

        return change

    return to


RECIPE = ("externalParameters", "recipe")
FIRST = ("resolvedDependencies", 0)
FILE = ("resolvedDependencies", 2)
COMMIT = "0" * 40


def _recipe_text(text: str) -> dict[str, str]:
    return {"text": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            _set("buildType")("https://github.com/mergekit-select/mergekit-select/merge/v2"),
            "buildType must end in v1, got",
        ),
        (_set("buildType")("https://example.org/v1"), "buildType must be"),
        (_set(*RECIPE, "text")("merge_method: linear"), "must have the sha256 that stands beside it"),
        (_set(*FILE, "uri")("file:a#../../x"), "must be a relative path without '..', got '../../x'"),
        (_set(*FILE, "uri")("file:a#/etc/passwd"), "must be a relative path without '..', got '/etc/passwd'"),
        (_set(*FILE, "uri")("file:a#%2e%2e/x"), "must be a relative path without '..', got '../x'"),
        (_set(*FILE, "uri")("file:a#C:\\x"), "must be a relative path"),
        (_set(*FILE, "digest")({"sha256": "0" * 63}), "sha256 must have 64 hexadecimal digits"),
        (_set(*FILE, "digest")({"md5": "0" * 32}), "must be of sha256, gitBlob, gitCommit, got 'md5'"),
        (_set(*FILE, "annotations")({"size": -1}), "must have a size and a digest"),
        (_set(*FIRST, "uri")("https://evil.example/a"), "must be pkg:huggingface/OWNER/NAME@COMMIT"),
        (
            _set(*FIRST, "uri")(f"pkg:huggingface/a/b@{COMMIT}?repository_url=https://evil.example"),
            "must be pkg:huggingface/OWNER/NAME@COMMIT",
        ),
        (_set(*FIRST, "uri")("pkg:huggingface/a/b@main"), "must be pkg:huggingface/OWNER/NAME@COMMIT"),
        (_set(*FIRST, "digest")({"sha256": "0" * 64}), "must have the digest of its files"),
        (_set(*FIRST, "annotations")({}), "must have a reference, roles and files"),
        (_set(*FIRST, "annotations", "reference")("./other"), "must be of the model './other'"),
        (_set(*FILE, "annotations")({"size": 1 << 63}), "must have a size and a digest"),
        (lambda content: content["resolvedDependencies"].append(content["resolvedDependencies"][0]), "got 2 of "),
        (lambda content: content["resolvedDependencies"].pop(0), "got 0 of "),
        (
            lambda content: content["externalParameters"].update(recipe=_recipe_text("models: [&a [*a]]")),
            "lock.json",
        ),
        (_set("externalParameters", "reproducible")("surely"), "reproducible"),
        (_set("externalParameters", "options", "out_shard_size")("much"), "out_shard_size"),
    ],
)
def test_a_lock_that_breaks_a_rule_is_one_line(
    recorded: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], said: str
) -> None:
    content = json.loads((recorded / "lock.json").read_text())
    change(content)
    (tmp_path / "lock.json").write_text(json.dumps(content))
    result = invoke("reproduce", tmp_path / "lock.json", tmp_path / "out")
    one_line(result, 2, said)
    assert not (tmp_path / "out").exists()


def test_a_truncated_lock_is_one_line(recorded: Path, tmp_path: Path) -> None:
    content = (recorded / "lock.json").read_bytes()
    for kept in (0, 1, len(content) // 2, len(content) - 2):
        (tmp_path / "lock.json").write_bytes(content[:kept])
        one_line(invoke("reproduce", tmp_path / "lock.json", tmp_path / "out"), 2, "lock.json must be JSON")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("merge_provenance.json", _set("predicate", "buildDefinition", "buildType")(f"{BUILD_TYPE[:-1]}2")),
        ("merge_tensors.json", _set("schema")(f"{TENSOR_TABLE[:-1]}2")),
    ],
)
def test_a_record_of_another_version_is_one_line(
    recorded: Path, tmp_path: Path, file: str, change: Callable[[dict[str, Any]], None]
) -> None:
    from mergekit_select.provenance.documents import read_document

    content = json.loads((recorded / "out" / file).read_text())
    change(content)
    (tmp_path / file).write_text(json.dumps(content))
    kind: Any = Statement if file == "merge_provenance.json" else TensorTable
    with pytest.raises(UnreadableError, match="must end in v1, got "):
        read_document(tmp_path / file, kind)


def test_names_that_are_too_long_are_one_line(recorded: Path, tmp_path: Path) -> None:
    long = "n" * 300
    for command in (
        ("lock", recorded / "out.yml", "--out", tmp_path / long),
        ("lock", recorded / "out.yml", "--map", f"{long}={long}"),
        ("reproduce", long),
        ("reproduce", tmp_path / long / "x"),
        ("verify", tmp_path / long),
        ("verify", recorded / "out", "--record", "--recipe", long),
        ("publish", tmp_path / long, "me/new"),
    ):
        assert invoke(*command).exit_code == 2, command
    ran = invoke("reproduce", recorded / "lock.json", tmp_path / long)
    assert ran.exit_code in (1, 2)
    assert len(ran.output.strip().splitlines()) == 1, ran.output
    content = json.loads((recorded / "out/merge_provenance.json").read_text())
    content["subject"][1]["name"] = long
    folder = tmp_path / "m"
    shutil.copytree(recorded / "out", folder)
    (folder / "merge_provenance.json").write_text(json.dumps(content))
    ran = invoke("verify", folder)
    assert ran.exit_code == 1
    assert ran.stdout.startswith(f"changed: {long}: is recorded and not there")


def test_a_size_that_no_disk_holds_is_one_line(recorded: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(recorded / "out", folder)
    table = json.loads((folder / "merge_tensors.json").read_text())
    next(iter(table["tensors"].values()))["shape"] = [10**400] * 20
    (folder / "merge_tensors.json").write_text(json.dumps(table))
    statement = json.loads((folder / "merge_provenance.json").read_text())
    sha256 = hashlib.sha256((folder / "merge_tensors.json").read_bytes()).hexdigest()
    statement["predicate"]["runDetails"]["byproducts"][0]["digest"]["sha256"] = sha256
    (folder / "merge_provenance.json").write_text(json.dumps(statement))
    one_line(invoke("reproduce", folder), 2, "tensors must have fewer than 2^63 bytes")


def test_a_file_that_cannot_be_recorded_is_one_line(recorded: Path, tmp_path: Path) -> None:
    folder, index = tmp_path / "m", "model.safetensors.index.json"
    shutil.copytree(recorded / "out", folder)
    weights = (folder / "model.safetensors").rename(folder / "a\\b.safetensors").name
    (folder / index).write_text(json.dumps({"weight_map": {"lm_head.weight": weights}}))
    written(tmp_path / "r.yml", recipe("passthrough", None, [folder]))
    one_line(invoke("lock", tmp_path / "r.yml"), 2, "must be a relative path without '..'")


@pytest.mark.parametrize("name", ["merge_provenance.json", "merge_tensors.json"])
def test_a_truncated_record_is_one_line(recorded: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    for file in (recorded / "out").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / name).write_bytes((folder / name).read_bytes()[:-40])
    for command in (("verify", folder), ("reproduce", folder, tmp_path / "out")):
        one_line(invoke(*command), 2, name)
    assert not (tmp_path / "out").exists()


def test_a_subject_outside_the_folder_is_one_line(recorded: Path, tmp_path: Path) -> None:
    content = json.loads((recorded / "out/merge_provenance.json").read_text())
    content["subject"][1]["name"] = "../secret"
    (tmp_path / "merge_provenance.json").write_text(json.dumps(content))
    (tmp_path / "config.json").write_text("{}")
    one_line(invoke("verify", tmp_path), 2, "must be a relative path without '..', got '../secret'")


def test_code_from_a_hub_is_never_run(recorded: Path, tmp_path: Path) -> None:
    content = json.loads((recorded / "lock.json").read_text())
    content["externalParameters"]["options"]["trust_remote_code"] = True
    (tmp_path / "lock.json").write_text(json.dumps(content))
    result = invoke("reproduce", tmp_path / "lock.json", tmp_path / "out")
    assert result.exit_code == 1
    assert result.stdout.startswith("error remote-code at options: ")
    assert "code from a hub is never run here" in result.stdout
    assert not (tmp_path / "out").exists()


def test_root_digest_is_that_of_the_sha256_in_order_of_paths(recorded: Path) -> None:
    subjects = json.loads((recorded / "out/merge_provenance.json").read_text())["subject"]
    joined = b"".join(bytes.fromhex(s["digest"]["sha256"]) for s in sorted(subjects[1:], key=lambda s: str(s["name"])))
    assert subjects[0] == {"name": ".", "digest": {"sha256": hashlib.sha256(joined).hexdigest()}}


if __name__ == "__main__":
    Path(str(SCHEMA)).write_text(json.dumps(schema(), indent=2) + "\n", "utf-8")
