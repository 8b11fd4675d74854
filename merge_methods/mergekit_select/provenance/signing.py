"""Signatures by OpenSSF model-signing: ``model.sig`` is over every other file of a folder that is published."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_select import kinds
from mergekit_select.errors import UnreadableError, one_line
from mergekit_select.findings import Findings
from mergekit_select.inputs.files import hidden, published_names
from mergekit_select.provenance.recording import SIGNATURE


@dataclass(frozen=True)
class Trust:
    """Whose signature is expected; nobody's, unless a key or an identity is given.

    Attributes:
        public_key: A public elliptic-curve key, in PEM.
        identity: Who signed with Sigstore, such as an e-mail address.
        provider: The URL of who vouches for that identity.
    """

    public_key: Path | None = None
    identity: str | None = None
    provider: str | None = None


def signer(key: Path | None) -> Callable[[Path], None]:
    """Return what signs a folder.

    Args:
        key: A private elliptic-curve key, in PEM, without a password; None to sign with Sigstore, as whom the reader
            logs in as.

    Raises:
        UnreadableError: model-signing is not installed, or the key cannot be used.
    """
    library = _library()
    config = library.signing.Config()
    name = f"the key {key}" if key else "Sigstore"
    try:
        if key:
            config.use_elliptic_key_signer(private_key=key)
        else:
            config.use_sigstore_signer(use_ambient_credentials=True)
    except Exception as error:  # nobody lists what model-signing and the layers below raise
        raise UnreadableError(f"cannot sign with {name}: {one_line(error)}") from error

    def sign(folder: Path) -> None:
        published = {name.partition("/")[0] for name in published_names(folder)}
        others = [entry.name for entry in folder.iterdir() if entry.name not in published]
        config.set_hashing_config(_hashing(library, [SIGNATURE, *others]))
        try:
            with redirect_stdout(sys.stderr):
                config.sign(folder, folder / SIGNATURE)
        except Exception as error:  # as above
            raise UnreadableError(f"cannot sign {folder} with {name}: {one_line(error)}") from error

    return sign


def signature_findings(folder: Path, trust: Trust) -> Findings:
    """Say whether a folder has the signature that is expected, and whether it has one that was not checked.

    Raises:
        UnreadableError: It cannot be checked here.
    """
    found, path = Findings(), folder / SIGNATURE
    who = str(trust.public_key or trust.identity or "")
    if not os.path.exists(path):
        if who:
            found.add(kinds.SIGNATURE_MISSING, SIGNATURE, who=who)
        return found
    if not who:
        found.add(kinds.SIGNATURE_UNCHECKED, SIGNATURE)
        return found
    library = _library()
    beside = [SIGNATURE, *(entry.name for entry in folder.iterdir() if hidden(entry.name))]
    config = library.verifying.Config().set_hashing_config(_hashing(library, beside))
    try:
        if trust.public_key:
            config.use_elliptic_key_verifier(public_key=trust.public_key)
        else:
            config.use_sigstore_verifier(identity=trust.identity, oidc_issuer=trust.provider)
    except Exception as error:  # nobody lists what model-signing and the layers below raise
        raise UnreadableError(f"cannot check {path} against {who}: {one_line(error)}") from error
    try:
        with redirect_stdout(sys.stderr):
            config.verify(folder, path)
    except Exception as error:  # as above; whatever it is, the signature was not verified
        found.add(kinds.SIGNATURE_WRONG, SIGNATURE, who=who, problem=one_line(error))
    return found


def _hashing(library: Any, ignored: Sequence[str]) -> Any:
    """Return how model-signing hashes a folder but for some files; links are followed, as in the cache of a hub."""
    return library.hashing.Config().set_allow_symlinks(True).set_ignored_paths(paths=ignored)


def _library() -> Any:
    try:
        import model_signing
    except ImportError as error:
        raise UnreadableError(
            f"signatures need the package model-signing ({one_line(error)}); "
            f"install it with `pip install 'mergekit-select[sign]'`"
        ) from error
    return model_signing
