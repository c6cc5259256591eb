"""A hub on this machine: models and data sets from folders, licences and tokens, range requests, lost connections.

It answers what huggingface_hub and datasets ask of huggingface.co: revisions, trees, and files that are resolved.
"""

import fnmatch
import hashlib
import json
import re
import secrets
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Hub:
    """What is served, and what was asked for.

    Attributes:
        root: holds models/OWNER/NAME and datasets/OWNER/NAME.
        licence: "OWNER/NAME" of the repositories whose licence has to be accepted.
        tokens: each one with the repositories whose licence its owner has accepted.
        losses: patterns of files; each loses the connection once, after half of what was asked for.
        asked: method, path and status of each request.
        sent: bytes of each file, by its name.
        stop: end it at once, as a network that is gone.
    """

    root: Path
    licence: set[str] = field(default_factory=set)
    tokens: dict[str, set[str]] = field(default_factory=dict)
    losses: list[str] = field(default_factory=list)
    asked: list[tuple[str, str, int]] = field(default_factory=list)
    sent: Counter[str] = field(default_factory=Counter)
    commit: str = field(default_factory=lambda: secrets.token_hex(20))  # of every repository
    address: str = ""
    stop: Callable[[], None] = lambda: None

    @property
    def environment(self) -> dict[str, str]:
        """Variables by which a process finds this hub, and no other."""
        return {"HF_ENDPOINT": self.address, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "5"}

    def downloads(self, name: str) -> list[str]:
        """The files of a repository whose content was asked for, in order."""
        found = (
            re.fullmatch(rf"/(?:datasets/)?{name}/resolve/\w+/(.+)", path)
            for way, path, _ in self.asked
            if way == "GET"
        )
        return [match[1] for match in found if match]


@contextmanager
def serve(root: Path, **options: Any) -> Iterator[Hub]:
    """A hub that serves a folder while the block runs."""
    hub = Hub(root, **options)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()

    def stop() -> None:
        server.shutdown()
        thread.join()
        server.server_close()

    hub.stop = stop
    try:
        yield hub
    finally:
        stop()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr: `Hub.asked` holds it."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.answer(unquote(urlsplit(self.path).path), body)

    def do_GET(self) -> None:
        self.answer(unquote(urlsplit(self.path).path), b"")

    def answer(self, path: str, body: bytes) -> None:
        kinds = "models|datasets"
        api = re.fullmatch(
            rf"/api/({kinds})/([^/]+/[^/]+)(?:/(revision|tree|paths-info|refs)(?:/([^/]+)(?:/(.*))?)?)?", path
        )
        file = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/(?:resolve|raw)/([^/]+)/(.+)", path)
        if not (api or file):
            return self.refuse(404, "EntryNotFound", "no such page")
        kind, name = (api[1], api[2]) if api else ("datasets" if file[1] else "models", file[2])
        folder, revision = self.hub.root / kind / name, (api[4] if api else file[3])
        if not folder.is_dir():
            return self.refuse(
                401 if "Authorization" not in self.headers else 404, "RepoNotFound", "Repository not found"
            )
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        if revision not in (None, "main", self.hub.commit):
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if file:
            if name in self.hub.licence and name not in self.hub.tokens.get(token, ()):
                why = f"Access to {'datasets' if file[1] else 'model'} {name} is restricted."
                return self.refuse(403 if token else 401, "GatedRepo", why)
            return self.send_part(folder / file[4])
        if api[3] == "paths-info":
            wanted = (
                json.loads(body)["paths"] if body[:1] == b"{" else re.findall(r"paths=([^&]+)", unquote(body.decode()))
            )
            return self.send_json([_entry(folder, folder / path) for path in wanted if (folder / path).exists()])
        if api[3] == "tree":
            start = folder / (api[5] or "")
            if not start.is_dir():
                return self.refuse(404, "EntryNotFound", f"{api[5]} does not exist")
            everything = "recursive=true" in self.path.lower()
            return self.send_json(
                [_entry(folder, path) for path in sorted(start.rglob("*") if everything else start.iterdir())]
            )
        if api[3] == "refs":
            return self.send_json(
                {
                    "branches": [{"name": "main", "ref": "refs/heads/main", "targetCommit": self.hub.commit}],
                    "tags": [],
                    "converts": [],
                }
            )
        files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        return self.send_json(
            {
                "id": name,
                "sha": self.hub.commit,
                "private": False,
                "disabled": False,
                "gated": "manual" if name in self.hub.licence else False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "lastModified": "2026-01-01T00:00:00.000Z",
                "createdAt": "2026-01-01T00:00:00.000Z",
                "siblings": [{"rfilename": file} for file in files],
            }
        )

    def send_part(self, file: Path) -> None:
        """A file, or the bytes of it that are asked for; the connection may be lost on the way."""
        if not file.is_file():
            return self.refuse(404, "EntryNotFound", f"{file.name} does not exist")
        size = file.stat().st_size
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start, stop = (int(asked[1]), min(int(asked[2] or size - 1), size - 1) + 1) if asked else (0, size)
        if asked and start >= size:
            return self.refuse(416, "", "range not satisfiable")
        self.begin(206 if asked else 200, stop - start)
        checksum = hashlib.sha256(file.read_bytes()).hexdigest()
        headers = {"ETag": f'"{checksum}"', "X-Linked-ETag": f'"{checksum}"', "X-Linked-Size": str(size)}
        headers |= {
            "X-Repo-Commit": self.hub.commit,
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        if asked:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return None
        lost = next((pattern for pattern in self.hub.losses if fnmatch.fnmatch(file.name, pattern)), None)
        with file.open("rb") as content:
            content.seek(start)
            part = content.read((stop - start) // 2 if lost else stop - start)
        self.wfile.write(part)
        self.hub.sent[file.name] += len(part)
        if lost:
            self.hub.losses.remove(lost)
            self.close_connection = True
            self.connection.close()
        return None

    def send_json(self, content: Any) -> None:
        body = json.dumps(content).encode()
        self.begin(200, len(body))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str, message: str) -> None:
        body = json.dumps({"error": message}).encode()
        self.begin(status, len(body))
        self.send_header("X-Error-Message", message)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def begin(self, status: int, length: int) -> None:
        self.hub.asked.append((self.command, unquote(urlsplit(self.path).path), status))
        self.send_response(status)
        self.send_header("Content-Length", str(length))


def _entry(folder: Path, path: Path) -> dict[str, Any]:
    """What the hub lists of a file or folder."""
    name = str(path.relative_to(folder))
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
    checksum, size = hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size
    return {
        "type": "file",
        "path": name,
        "oid": checksum[:40],
        "size": size,
        "lfs": {"oid": checksum, "size": size, "pointerSize": 134},
    }
