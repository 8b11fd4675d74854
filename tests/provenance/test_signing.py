"""`publish` signs with a key, `verify` checks the signature; what cannot be verified is said."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.provenance.hub_server import TOKEN, Hub
from tests.support.checkpoints import copied
from tests.support.commands import invoke, one_line
from tests.support.models import small_family
from tests.support.recipes import merge, recipe, written

model_signing = pytest.importorskip("model_signing")


def write_keys(folder: Path, name: str) -> tuple[Path, Path]:
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with mine.pem, mine.pub, other.pem and other.pub."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("mine", "other"):
        write_keys(folder, name)
    return folder


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory, keys: Path) -> Path:
    from mergekit_select.provenance.signing import signer

    subs = small_family().subs[:2]
    out = merge(recipe("linear", None, subs, parameters={"weight": 1}), tmp_path_factory.mktemp("signed") / "out")
    assert invoke("verify", out, "--record").exit_code == 0
    (out / ".merge").mkdir()
    (out / ".merge" / "left").write_text("hidden files are not published")
    signer(keys / "mine.pem")(out)
    return out


@pytest.fixture
def folder(signed: Path, tmp_path: Path) -> Path:
    return copied(signed, tmp_path / "out")


def problems(*arguments: object, code: int = 1) -> list[dict[str, str]]:
    ran = invoke("verify", *arguments, "--json")
    assert ran.exit_code == code, ran.output
    return list(json.loads(ran.stdout)["problems"])


def test_a_signature_verifies_here_and_in_model_signing(folder: Path, keys: Path) -> None:
    assert problems(folder, "--public-key", keys / "mine.pub", code=0) == []
    verifier: Any = model_signing.verifying.Config().use_elliptic_key_verifier(public_key=keys / "mine.pub")
    verifier.verify(folder, folder / "model.sig")


@pytest.mark.parametrize("name", ["README.md", "merge_tensors.json"])
def test_another_byte_in_any_file_is_found(folder: Path, keys: Path, name: str) -> None:
    (folder / name).write_bytes((folder / name).read_bytes().replace(b"a", b"A", 1))
    if name == "merge_tensors.json":
        one_line(invoke("verify", folder, "--public-key", keys / "mine.pub"), 2, "must give its sha256")
        return
    (found,) = problems(folder, "--public-key", keys / "mine.pub")
    assert (found["kind"], found["place"]) == ("signature", "model.sig")
    assert f"must be of these files and verify with {keys / 'mine.pub'}: Signature mismatch" in found["text"]
    assert "README.md" in found["text"]


def test_a_file_that_was_not_signed_is_found(folder: Path, keys: Path) -> None:
    (folder / "notes.txt").write_text("")
    (found,) = problems(folder, "--public-key", keys / "mine.pub")
    assert "Extra files found in model 'out': notes.txt" in found["text"]


def test_the_signature_of_another_is_none(folder: Path, keys: Path) -> None:
    (found,) = problems(folder, "--public-key", keys / "other.pub")
    assert found["kind"] == "signature"
    assert "Key mismatch" in found["text"]


def test_a_forged_statement_is_found(folder: Path, keys: Path) -> None:
    from base64 import b64decode, b64encode

    bundle = json.loads((folder / "model.sig").read_text())
    payload = b64decode(bundle["dsseEnvelope"]["payload"]).replace(b"out", b"otu", 1)
    bundle["dsseEnvelope"]["payload"] = b64encode(payload).decode()
    (folder / "model.sig").write_text(json.dumps(bundle))
    (found,) = problems(folder, "--public-key", keys / "mine.pub")
    assert "InvalidSignature" in found["text"]


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", '{"verificationMaterial": {}, "mediaType": 1}'])
def test_what_is_no_signature_is_one_problem(folder: Path, keys: Path, content: str) -> None:
    (folder / "model.sig").write_text(content)
    (found,) = problems(folder, "--public-key", keys / "mine.pub")
    assert found["kind"] == "signature"
    (folder / "model.sig").unlink()
    (found,) = problems(folder, "--public-key", keys / "mine.pub")
    assert found["text"].startswith("must be there and verify with ")


def test_a_signature_that_nobody_asked_about_is_a_warning(folder: Path) -> None:
    ran = invoke("verify", folder)
    assert ran.exit_code == 0
    assert "whose signature to expect was not said: it was not checked; give --public-key" in ran.stdout
    assert invoke("verify", folder, "--strict").exit_code == 1


def test_what_cannot_be_checked_is_one_line(folder: Path, keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one_line(invoke("verify", folder, "--public-key", keys / "nothing.pub"), 2, "nothing.pub")
    one_line(invoke("verify", folder, "--public-key", folder / "config.json"), 2, "cannot check")
    one_line(invoke("publish", folder, "me/new", "--signing-key", keys / "mine.pub"), 2, "cannot sign with the key")
    assert "both of --identity and --identity-provider" in invoke("verify", folder, "--identity", "me").output
    monkeypatch.setitem(sys.modules, "model_signing", None)
    for command in (("verify", folder, "--public-key", keys / "mine.pub"), ("publish", folder, "me/new", "--sign")):
        one_line(invoke(*command), 2, "install it with `pip install 'mergekit-select[sign]'`")


def test_published_signed_and_verified_by_a_stranger(
    online: Hub, keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for number, sub in enumerate(small_family().subs[:2]):
        online.add(f"org/sub-{number}", sub)
    written(Path("r.yml"), recipe("linear", None, ["org/sub-0", "org/sub-1"], parameters={"weight": 1}))
    assert invoke("run", "yaml", "r.yml", "out", "--quiet").exit_code == 0
    online.add("me/used", {"notes.txt": b"x"}, licence=None)
    ran = invoke("publish", "out", "me/used", "--public", "--signing-key", keys / "mine.pem")
    one_line_of = [line for line in ran.stderr.splitlines() if line.startswith("Error: ")]
    assert ran.exit_code == 1
    assert "me/used must hold no files beside those that are signed" in one_line_of[0]
    ran = invoke("publish", "out", "me/new", "--signing-key", keys / "mine.pem")
    assert ran.exit_code == 0, ran.output
    assert "model.sig" in online.files("me/new")
    assert problems("me/new", "--public-key", keys / "mine.pub", code=0) == []
    assert invoke("reproduce", "me/new").exit_code == 0
    ran = invoke("publish", "out", "me/new", "--json")
    assert ran.exit_code == 1
    assert {f["place"] for f in json.loads(ran.stdout)["findings"] if f["severity"] == "error"} == {"model.sig"}
    Path("out/model.sig").unlink()
    assert invoke("publish", "out", "me/new").exit_code == 0
    assert "model.sig" not in online.files("me/new")
