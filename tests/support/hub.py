"""A hub on this machine that serves folders as repositories, and counts what it sends."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789012345678901234567890123456789"


class Hub(ThreadingHTTPServer):
    """Answers metadata calls and range requests on files, as far as huggingface_hub asks."""

    daemon_threads = True

    def __init__(self, repositories: Mapping[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories = repositories
        self.requests: list[str] = []
        self.sent: dict[str, int] = {}  # bytes by the file's name

    @property
    def url(self) -> str:
        """What HF_ENDPOINT must hold."""
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def serving(repositories: Mapping[str, Path]) -> Iterator[Hub]:
    """Serve folders by their hub ids while the block runs."""
    hub = Hub(repositories)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None: ...

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        self.server.requests.append(f"{self.command} {path}")
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/.+)?", path):
            folder = self.server.repositories.get(match[1])
            if folder is not None:
                files = [{"rfilename": file.name} for file in folder.iterdir()]
                described = {"id": match[1], "modelId": match[1], "sha": COMMIT, "siblings": files}
                return self._send(200, json.dumps(described).encode(), body, "application/json")
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            folder = self.server.repositories.get(match[1])
            if folder is not None and (folder / match[2]).exists():
                return self._send(200, (folder / match[2]).read_bytes(), body, "application/octet-stream", match[2])
            if folder is not None:
                return self._send(404, b"", body, "text/plain", error="EntryNotFound")
        return self._send(404, b"", body, "text/plain", error="RepoNotFound")

    def _send(self, status: int, content: bytes, body: bool, kind: str, name: str = "", error: str = "") -> None:
        total = len(content)
        part = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if part and status == 200:
            first = int(part[1])
            content, status = content[first : int(part[2]) + 1], 206
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", COMMIT)
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{first + len(content) - 1}/{total}")
        if name:
            self.send_header("ETag", f'"{abs(hash(name)):x}"')
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if body:
            self.server.sent[name] = self.server.sent.get(name, 0) + len(content)
            self.wfile.write(content)
