"""A model hub on 127.0.0.1 that speaks what huggingface_hub uses, with faults on demand.

It keeps repositories as commits of files, knows branches, pull requests, gated and private repositories, and redirects
large files to another path, as hubs do.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_secretsecretsecretsecret"
_LFS = (".safetensors", ".bin", ".model", ".png")
_DATE = "2026-01-01T00:00:00.000Z"


Query = dict[str, list[str]]


class Answer(NamedTuple):
    status: int = 200
    body: Any = b""
    headers: dict[str, str] = {}  # noqa: RUF012  # never changed


class Asked(NamedTuple):
    method: str
    query: Query
    body: bytes
    token: str | None


@dataclass
class Fault:
    """What happens instead of the answer to requests that match, so many times."""

    pattern: str
    times: int
    change: Callable[[Answer], Answer | None]

    def applies(self, request: str) -> bool:
        return self.times > 0 and re.search(self.pattern, request) is not None


@dataclass
class Repository:
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    pulls: dict[int, dict[str, Any]] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], ref: str = "main") -> str:
        digests = {name: hashlib.sha1(content).hexdigest() for name, content in files.items()}
        parent = self.refs.get(ref, "")
        sha = hashlib.sha1(json.dumps([parent, digests], sort_keys=True).encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.refs[ref] = sha
        return sha

    def at(self, revision: str) -> str | None:
        sha = self.refs.get(revision, revision)
        return sha if sha in self.commits else None


def blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub(ThreadingHTTPServer):
    """The server; `url` is what HF_ENDPOINT should be."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.readers: set[str] = {TOKEN}
        self.change_commits = False  # whether a newline is lost on the way

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add(
        self, name: str, folder: Path | dict[str, bytes], licence: str | None = "apache-2.0", gated: bool = False
    ) -> str:
        """Commit a folder's files to a repository's main branch; return the commit."""
        files = {p.name: p.read_bytes() for p in folder.iterdir()} if isinstance(folder, Path) else dict(folder)
        if licence is not None:
            files["README.md"] = f"---\nlicense: {licence}\n---\n# {name}\n".encode()
        repository = self.repositories.setdefault(name, Repository(gated=gated))
        self.large.update({hashlib.sha256(content).hexdigest(): content for content in files.values()})
        return repository.commit(files)

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        repository = self.repositories[name]
        return repository.commits[repository.refs.get(revision, revision)]

    def fail(self, pattern: str, status: int, times: int = 10**6, **headers: str) -> None:
        """Answer requests that match "METHOD /path" with an error."""
        answer = Answer(status, b"{}", {name.replace("_", "-"): value for name, value in headers.items()})
        self.faults.append(Fault(pattern, times, lambda _: answer))

    def cut(self, pattern: str, times: int = 10**6) -> None:
        """Close the connection in the middle of the body."""
        self.faults.append(Fault(pattern, times, lambda _: None))

    def garble(self, pattern: str, times: int = 10**6) -> None:
        """Send other bytes of the same length."""
        self.faults.append(
            Fault(pattern, times, lambda answer: answer._replace(body=answer.body[:-1] + bytes([answer.body[-1] ^ 1])))
        )

    # --- what it answers ---

    def answer(self, method: str, path: str, query: Query, body: bytes, token: str | None) -> Answer:
        if path == "/api/validate-yaml":
            return _validate(json.loads(body)["content"])
        if path == "/api/whoami-v2":
            return Answer(200, {"name": "me", "type": "user"}) if token in self.readers else Answer(401)
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}"
            if token not in self.readers:
                return Answer(401)
            if name in self.repositories:
                return Answer(409, {"error": "exists", "url": f"{self.url}/{name}"})
            private = wanted.get("private", wanted.get("visibility") == "private")
            self.repositories[name] = Repository(private=bool(private))
            self.repositories[name].commit({".gitattributes": b"*.safetensors filter=lfs\n"})
            return Answer(200, {"url": f"{self.url}/{name}", "name": name})
        if match := re.fullmatch(r"/cdn/(\w{64})", path):
            return self._large(method, match[1], body)
        for pattern, serve in self._routes:
            match = re.fullmatch(pattern, path)
            if match is None:
                continue
            repository = self.repositories.get(match["repo"])
            if repository is None or (repository.private and token not in self.readers):
                return _missing("RepoNotFound", 401 if token is None else 404)
            return serve(self, repository, match, Asked(method, query, body, token))
        return Answer(404, {"error": f"no such route {path}"})

    def _large(self, method: str, digest: str, body: bytes) -> Answer:
        if method == "PUT":
            if hashlib.sha256(body).hexdigest() != digest:
                return Answer(400)
            self.large[digest] = body
            return Answer()
        return Answer(200, self.large[digest])

    def _info(self, repository: Repository, match: re.Match[str], asked: Asked) -> Answer:
        sha = repository.at(unquote(match["revision"] or "main"))
        if sha is None:
            return _missing("RevisionNotFound")
        files = repository.commits[sha]
        card = _front_matter(files.get("README.md", b""))
        return Answer(
            200,
            {
                "id": match["repo"],
                "modelId": match["repo"],
                "sha": sha,
                "private": repository.private,
                "gated": "manual" if repository.gated else False,
                "siblings": [{"rfilename": name} for name in sorted(files)],
                "tags": [f"license:{card['license']}"] if "license" in card else [],
                "cardData": card,
            },
        )

    def _tree(self, repository: Repository, match: re.Match[str], asked: Asked) -> Answer:
        sha = repository.at(unquote(match["revision"]))
        if sha is None:
            return _missing("RevisionNotFound")
        wanted = sorted(repository.commits[sha])
        if match["kind"] == "paths-info":
            fields = json.loads(asked.body) if asked.body[:1] == b"{" else parse_qs(asked.body.decode())
            wanted = [name for name in wanted if name in fields["paths"]]
        size, page = 3, int(asked.query.get("cursor", ["0"])[0])  # small pages, so that paging is always exercised
        entries = [_entry(name, repository.commits[sha][name]) for name in wanted]
        if match["kind"] == "paths-info" or len(entries) <= size * (page + 1):
            return Answer(200, entries[size * page :] if match["kind"] == "tree" else entries)
        link = f'<{self.url}{match[0]}?recursive=True&cursor={page + 1}>; rel="next"'
        return Answer(200, entries[size * page : size * (page + 1)], {"Link": link})

    def _resolve(self, repository: Repository, match: re.Match[str], asked: Asked) -> Answer:
        sha = repository.at(unquote(match["revision"]))
        if sha is None:
            return _missing("RevisionNotFound")
        if repository.gated and asked.token not in self.readers:
            return _missing("GatedRepo", 403)
        content = repository.commits[sha].get(unquote(match["file"]))
        if content is None:
            return _missing("EntryNotFound")._replace(headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
        if not _is_large(match["file"]):
            return Answer(200, content, {"ETag": f'"{blob_id(content)}"', "X-Repo-Commit": sha})
        digest = hashlib.sha256(content).hexdigest()
        headers = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content)), "X-Repo-Commit": sha}
        elsewhere = self.url.replace("127.0.0.1", "localhost")  # another host, as a hub's store of large files is
        return Answer(302, b"", {**headers, "Location": f"{elsewhere}/cdn/{digest}"})

    def _access(self, repository: Repository, match: re.Match[str], asked: Asked) -> Answer:
        allowed = asked.token in self.readers or not repository.gated
        return Answer(200, {}) if allowed else _missing("GatedRepo", 403)

    def _preupload(self, repository: Repository, match: re.Match[str], asked: Asked) -> Answer:
        sha = repository.at(unquote(match["revision"]))
        if sha is None:
            return _missing("RevisionNotFound")
        held = repository.commits[sha]
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if _is_large(file["path"]) else "regular",
                "shouldIgnore": False,
                "oid": _entry(file["path"], held[file["path"]])["oid"] if file["path"] in held else None,
            }
            for file in json.loads(asked.body)["files"]
        ]
        return Answer(200, {"files": files})

    def _batch(self, repository: Repository, match: re.Match[str], asked: Asked) -> Answer:
        objects = [
            file
            if file["oid"] in self.large
            else {**file, "actions": {"upload": {"href": f"{self.url}/cdn/{file['oid']}", "header": {}}}}
            for file in json.loads(asked.body)["objects"]
        ]
        return Answer(200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"})

    def _commit(self, repository: Repository, match: re.Match[str], asked: Asked) -> Answer:
        if asked.token not in self.readers:
            return Answer(403, {"error": "read only"})
        ref = unquote(match["revision"])
        if ref not in repository.refs:
            return _missing("RevisionNotFound")
        files = dict(repository.commits[repository.refs[ref]])
        for line in asked.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                content = base64.b64decode(value["content"])
                files[value["path"]] = content[:-1] if self.change_commits else content
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.large[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        sha = repository.commit(files, ref)
        return Answer(200, {"success": True, "commitOid": sha, "commitUrl": f"{self.url}/{match['repo']}/commit/{sha}"})

    def _discussions(self, repository: Repository, match: re.Match[str], asked: Asked) -> Answer:
        pulls = repository.pulls
        if match["number"] is None and asked.method == "GET":
            return Answer(200, {"count": len(pulls), "start": 0, "discussions": [*pulls.values()]})
        if asked.token not in self.readers:
            return Answer(403, {"error": "read only"})
        if match["number"] is None:
            number, wanted = len(pulls) + 1, json.loads(asked.body)
            pulls[number] = {
                "num": number,
                "title": wanted["title"],
                "author": {"name": "me"},
                "createdAt": _DATE,
                "status": "draft",
                "isPullRequest": True,
                "repo": {"name": match["repo"], "type": "model"},
                "changes": {"base": "refs/heads/main"},
                "filesWithConflicts": [],
                "events": [],
            }
            repository.refs[f"refs/pr/{number}"] = repository.refs["main"]
            return Answer(200, pulls[number])
        pull = pulls[int(match["number"])]
        if match["action"] == "status":
            pull["status"] = json.loads(asked.body)["status"]
            event = {"id": "1", "type": "status-change", "createdAt": _DATE, "data": {"status": pull["status"]}}
            return Answer(200, {"newStatus": event})
        if match["action"] == "merge":
            if pull["status"] != "open":
                return Answer(400, {"error": "a draft cannot be merged"})
            pull["status"] = "merged"
            repository.refs["main"] = repository.refs[f"refs/pr/{pull['num']}"]
        return Answer(200, pull)

    _routes = (
        (r"/api/models/(?P<repo>[\w.-]+/[\w.-]+)(/revision/(?P<revision>.+))?", _info),
        (r"/api/models/(?P<repo>[\w.-]+/[\w.-]+)/(?P<kind>tree|paths-info)/(?P<revision>[^/]+)", _tree),
        (r"/api/models/(?P<repo>[\w.-]+/[\w.-]+)/auth-check", _access),
        (r"/api/models/(?P<repo>[\w.-]+/[\w.-]+)/preupload/(?P<revision>.+)", _preupload),
        (r"/api/models/(?P<repo>[\w.-]+/[\w.-]+)/commit/(?P<revision>.+)", _commit),
        (r"/api/models/(?P<repo>[\w.-]+/[\w.-]+)/discussions(/(?P<number>\d+)(/(?P<action>\w+))?)?", _discussions),
        (r"/(?P<repo>[\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", _batch),
        (r"/(?P<repo>[\w.-]+/[\w.-]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)", _resolve),
    )


def _is_large(name: str) -> bool:
    return name.endswith(_LFS)


def _entry(name: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": blob_id(content)}
    if _is_large(name):
        digest = hashlib.sha256(content).hexdigest()
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {len(content)}\n".encode()
        entry |= {"oid": blob_id(pointer), "lfs": {"oid": digest, "size": len(content), "pointerSize": len(pointer)}}
    return entry


def _missing(code: str, status: int = 404) -> Answer:
    return Answer(status, {"error": code}, {"X-Error-Code": code, "X-Error-Message": code})


def _front_matter(content: bytes) -> dict[str, Any]:
    parts = content.decode().split("---\n")
    return dict(yaml.safe_load(parts[1])) if len(parts) > 2 else {}


def _validate(content: str) -> Answer:
    """Check a card's metadata for what the real hub refuses."""
    card = _front_matter(content.encode())
    errors = []
    if card.get("base_model_relation") not in (None, "merge", "finetune", "adapter", "quantized"):
        errors.append({"message": '"base_model_relation" must be one of [merge, finetune, adapter, quantized]'})
    for name in card.get("base_model", []):
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            errors.append({"message": f'"base_model[0]" with value "{name}" is not valid. Use a model id'})
    if not re.fullmatch(r"[a-z0-9.-]+", card.get("license", "x")):
        errors.append({"message": '"license" must be one of the known licences'})
    return Answer(400 if errors else 200, {"errors": errors, "warnings": []})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def _serve(self) -> None:
        url = urlsplit(self.path)
        body = self._body()
        bearer = self.headers.get("Authorization") or ""
        token = bearer.removeprefix("Bearer ") or None
        request = f"{self.command} {url.path}"
        self.server.requests.append(request)
        answer = self.server.answer(self.command, url.path, parse_qs(url.query), body, token)
        content = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        headers = {"Content-Type": "application/json", **answer.headers}
        status, cut = answer.status, False
        for fault in self.server.faults:
            if fault.applies(request):
                fault.times -= 1
                changed = fault.change(Answer(status, content, headers))
                cut = changed is None
                if changed is not None:
                    status, content, headers = changed
                break
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if start and status == 200:
            first = int(start[1])
            headers = {**headers, "Content-Range": f"bytes {first}-{len(content) - 1}/{len(content)}"}
            status, content = 206, content[first:]
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.close_connection = True

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    do_GET = do_HEAD = do_POST = do_PUT = _serve  # noqa: N815  # the names that http.server calls

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # http.server's name
        pass


@contextmanager
def serving() -> Iterator[Hub]:
    """Run a hub while the block runs."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


def environment(hub: Hub, home: Path, token: str | None = TOKEN) -> dict[str, str]:
    """The environment of a user whose hub this is, for a process of their own."""
    return {
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        **({"HF_TOKEN": token} if token else {}),
    }
