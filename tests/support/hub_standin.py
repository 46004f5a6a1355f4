"""A stand-in for the hub on this machine: it serves folders as repositories, and keeps an account of what it sent.

standin.publish("owner/name", folder)            main is then this folder
standin.publish("owner/name", other, "v2")       a tag; the commit of each is its own

And it takes uploads: what is committed to a repository lies in `standin.uploads / owner / name`, and is served.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import close_session, constants
from safetensors.torch import save_file

from polymerge.checkpoints import hub as hub_module
from polymerge.checkpoints import hub_api
from running import small_llama

_CHUNK = 1 << 16


@dataclass
class Request:
    method: str
    path: str
    range: str
    sent: int
    """Bytes of the answer, without its headers."""


@dataclass
class Repository:
    revisions: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Path] = field(default_factory=dict)
    private: bool = False
    refused: tuple[int, str] | None = None
    """Status and error code that everything of it is answered with."""


class Standin(ThreadingHTTPServer):
    """The server; `url` is what HF_ENDPOINT is set to."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.before: dict[str, Callable[[], None]] = {}
        """By the name of a file, what is done before its bytes are sent."""
        self.cut: dict[str, int] = {}
        """By the name of a file, after how many bytes the connection breaks, once."""
        self.reset: set[str] = set()
        """Names of files, the connections of which are reset after a first part, once each."""
        self.served: dict[str, bytes] = {}
        """By the name of a file, what is served in its place."""
        self.next: dict[str, list[bytes | int | None]] = {}
        """By the name of a file, how its next downloads are answered: by other bytes, a status, or as they should."""
        self.etags: dict[str, str] = {}
        """By the name of a file, an ETag that is not the listed one."""
        self.nameless = False
        """Whether ranges are served without the length of the whole."""
        self.held: dict[str, tuple[int, threading.Event]] = {}
        """By the name of a file, after how many bytes what is sent waits, and for what."""
        self.unsatisfiable: set[str] = set()
        """Names of files that are served whole only: 416 for every part that is not their beginning."""
        self.xet: dict[str, str] = {}
        """By the name of a file, its hash in the Xet storage that `xet_endpoint` names."""
        self.xet_endpoint = ""
        self.uploads: Path | None = None
        """Where repositories lie that are uploaded; without it nobody may write."""
        self.stored: dict[str, bytes] = {}
        """Large files that were uploaded, by their sha256, until a commit names them."""
        self.ranges = True
        """Whether it serves parts of files, or always all of them."""

    def publish(self, name: str, folder: Path, revision: str = "main") -> str:
        """Serve a folder as a revision; returns the commit."""
        repository = self.repositories.setdefault(name, Repository())
        commit = hashlib.sha1(f"{name}{folder}".encode()).hexdigest()
        repository.revisions[revision] = commit
        repository.commits[commit] = folder
        return commit

    def refuse(self, name: str, status: int, code: str) -> None:
        self.repositories.setdefault(name, Repository()).refused = status, code

    def of(self, end: str, method: str = "GET") -> list[Request]:
        """The requests for what ends so."""
        return [request for request in self.requests if request.method == method and request.path.endswith(end)]

    @property
    def sent(self) -> int:
        return sum(request.sent for request in self.requests)

    def handle_error(self, *_: Any) -> None:
        """A client that has enough goes away."""


class _Handler(BaseHTTPRequestHandler):
    server: Standin
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        digest = self.path.rpartition("/")[2]
        content = self._body()
        assert hashlib.sha256(content).hexdigest() == digest
        self.server.stored[digest] = content
        self._send(200, {}, [])

    def do_POST(self) -> None:
        path, body = unquote(urlsplit(self.path).path), self._body()
        name = "/".join(path.removeprefix("/api/models").strip("/").split("/")[:2]).removesuffix(".git")
        if path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif self.server.uploads is None:
            self._refuse(403, "")
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            self.server.repositories[name] = Repository(
                private=asked.get("private") or asked.get("visibility") == "private"
            )
            (self.server.uploads / name).mkdir(parents=True)
            self._json({"url": f"{self.server.url}/{name}", "name": name, "id": name})
        elif "/preupload/" in path:
            large = (".safetensors", ".bin")
            modes = {
                one["path"]: "lfs" if one["path"].endswith(large) else "regular" for one in json.loads(body)["files"]
            }
            said = [{"path": one, "uploadMode": mode, "shouldIgnore": False} for one, mode in modes.items()]
            self._json({"files": said})
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.server.url}/lfs/{one['oid']}", "header": {}}}}
                for one in json.loads(body)["objects"]
            ]
            self._json({"transfer": "basic", "objects": objects})
        elif "/commit/" in path:
            self._commit(name, [json.loads(line) for line in body.splitlines()])
        else:
            self._refuse(404, "")

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        assert self.server.uploads is not None
        folder = self.server.uploads / name
        for line in lines:
            value = line["value"]
            if line["key"] in ("file", "lfsFile"):
                file = folder / value["path"]
                file.parent.mkdir(parents=True, exist_ok=True)
                whole = line["key"] == "file"
                file.write_bytes(base64.b64decode(value["content"]) if whole else self.server.stored.pop(value["oid"]))
        commit = self.server.publish(name, folder)
        self._json({"commitUrl": f"{self.server.url}/{name}/commit/{commit}", "commitOid": commit})

    def _body(self) -> bytes:
        return (
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if "Content-Length" in self.headers
            else b"".join(self._chunks())
        )

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/(.+)", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        whole = re.fullmatch(r"/api/models/([^/]+/[^/]+)", path)
        name, revision = (found[1], found[3]) if found else (file[1], file[2]) if file else ("", "")
        if whole:
            name, revision = whole[1], "main"
        repository = self.server.repositories.get(name)
        if path == "/xet-token":
            until = int(time.time()) + 3600
            said = {"casUrl": self.server.xet_endpoint, "accessToken": "none", "exp": until}
            headers = {
                "X-Xet-Cas-Url": self.server.xet_endpoint,
                "X-Xet-Access-Token": "none",
                "X-Xet-Token-Expiration": str(until),
            }
            self._send(200, {"Content-Type": "application/json", **headers}, [json.dumps(said).encode()])
        elif repository is None:
            self._refuse(404, "RepoNotFound")
        elif repository.refused:
            self._refuse(*repository.refused)
        elif whole and not repository.commits:
            self._json({"id": name, "private": repository.private, "siblings": []})
        elif (commit := repository.revisions.get(revision, revision)) not in repository.commits:
            self._refuse(404, "RevisionNotFound")
        elif whole or (found and found[2] == "revision"):
            listed = [
                {"rfilename": file["path"], "size": file["size"], "blobId": file["oid"]}
                | ({"lfs": _lfs(file)} if "lfs" in file else {})
                for file in _tree(repository.commits[commit])
            ]
            self._json({"id": name, "sha": commit, "private": repository.private, "siblings": listed})
        elif found:
            self._json(list(_tree(repository.commits[commit])))
        elif file:
            self._file(repository.commits[commit], file[3], commit)

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, {"X-Error-Code": code} if code else {}, [])

    def _json(self, value: object) -> None:
        self._send(200, {"Content-Type": "application/json"}, [json.dumps(value).encode()])

    def _file(self, folder: Path, name: str, commit: str) -> None:
        if not (folder / name).is_file():
            self._refuse(404, "EntryNotFound")
            return
        data = self.server.served.get(name)
        if self.command == "GET" and self.server.next.get(name):
            answer = self.server.next[name].pop(0)
            if isinstance(answer, int):
                self._send(answer, {}, [b""])
                return
            data = data if answer is None else answer
        size = (folder / name).stat().st_size if data is None else len(data)
        headers = {
            "ETag": f'"{self.server.etags.get(name) or _etag(folder / name)}"',
            "X-Repo-Commit": commit,
            "Accept-Ranges": "bytes",
        }
        if name in self.server.xet:
            headers |= {"X-Xet-Hash": self.server.xet[name], "Link": f'<{self.server.url}/xet-token>; rel="xet-auth"'}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        start, stop, status = 0, size, 200
        if asked and int(asked[1]) and name in self.server.unsatisfiable:
            self._send(416, {"Content-Range": f"bytes */{size}"}, [])
            return
        if asked and self.server.ranges:
            start, stop, status = int(asked[1]), min(int(asked[2] or size - 1) + 1, size), 206
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{'*' if self.server.nameless else size}"
        pieces = _pieces(folder / name, start, stop) if data is None else iter([data[start:stop]])
        if self.command == "GET" and not asked and name in self.server.held:
            pieces = _held(pieces, *self.server.held[name])
        if self.command == "GET" and not asked and name in self.server.before:
            self.server.before[name]()
        if self.command == "GET" and name in self.server.reset:
            self.server.reset.remove(name)
            self._reset(status, headers, pieces, stop - start)
            return
        cut = self.server.cut.pop(name, None) if self.command == "GET" and stop - start > _CHUNK // 4 else None
        self._send(status, headers, pieces, stop - start, cut)

    def _reset(self, status: int, headers: dict[str, str], body: Iterator[bytes], length: int) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(next(body)[: length // 2])
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def _send(
        self, status: int, headers: dict[str, str], body: Any, length: int | None = None, cut: int | None = None
    ) -> None:
        body = iter([b"".join(body)]) if length is None else body
        first = b"" if length is not None else next(body)
        # noted before anything is sent: who has the answer may look at the account at once
        request = Request(self.command, unquote(urlsplit(self.path).path), self.headers.get("Range") or "", 0)
        self.server.requests.append(request)
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(first) if length is None else length)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            for piece in (first, *()) if length is None else body:
                piece = piece if cut is None else piece[: cut - request.sent]
                request.sent += len(piece)
                self.wfile.write(piece)
                if cut is not None and request.sent >= cut:
                    self.close_connection = True
                    break


def _tree(folder: Path) -> Iterator[dict[str, Any]]:
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            name = file.relative_to(folder).as_posix()
            large = {"lfs": {"oid": _etag(file), "size": file.stat().st_size, "pointerSize": 130}}
            yield {
                "type": "file",
                "path": name,
                "size": file.stat().st_size,
                "oid": hashlib.sha1(f"{file.stat().st_size} {_etag(file)}".encode()).hexdigest(),
                **(large if file.suffix in (".safetensors", ".bin") else {}),
            }


def _lfs(file: dict[str, Any]) -> dict[str, Any]:
    return {"size": file["size"], "sha256": file["lfs"]["oid"], "pointerSize": 130}


def _etag(file: Path) -> str:
    """The sha256 of a file; of a large one, which only ever has a header, that of its beginning."""
    with file.open("rb") as stream:
        return hashlib.sha256(stream.read(1 << 22)).hexdigest()


def _pieces(file: Path, start: int, stop: int) -> Iterator[bytes]:
    with file.open("rb") as stream:
        stream.seek(start)
        while start < stop:
            piece = stream.read(min(_CHUNK, stop - start))
            start += len(piece)
            yield piece


def _held(pieces: Iterator[bytes], after: int, until: threading.Event) -> Iterator[bytes]:
    for piece in pieces:
        if 0 <= after < len(piece):
            yield piece[:after]
            until.wait(60)
            yield piece[after:]
        else:
            yield piece
        after -= len(piece)


@contextmanager
def serving() -> Iterator[Standin]:
    server = Standin()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def empty_cache(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[Standin]:
    """The stand-in is the hub of this process, nothing is in its cache, and nobody is logged in."""
    with serving() as server:
        places = environment(server, folder)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", places["HF_HUB_CACHE"])
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", places["HF_TOKEN_PATH"])
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        for name in ("XDG_CACHE_HOME", "NO_PROXY"):
            monkeypatch.setenv(name, places[name])
        monkeypatch.delenv("HF_TOKEN", raising=False)
        hub_module._seen.clear()
        hub_api.listing.cache_clear()
        close_session()
        yield server
        hub_module._seen.clear()
        hub_api.listing.cache_clear()
        close_session()


def xet_storage(server: Standin, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Path], None]:
    """A Xet storage that the stand-in sends one to, and what puts a file into it as what a shard is."""
    hf_xet = pytest.importorskip("hf_xet")
    monkeypatch.setenv("HF_XET_CACHE", str(folder / "xet"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    (folder / "cas").mkdir()
    server.xet_endpoint = f"local://{folder / 'cas'}"

    def put(name: str, file: Path) -> None:
        with hf_xet.XetSession().new_upload_commit(endpoint=server.xet_endpoint) as commit:
            upload = commit.start_upload_file(str(file))
        server.xet[name] = upload.result().xet_info.hash

    return put


def environment(server: Standin, folder: Path) -> dict[str, str]:
    """What a process needs to find the stand-in and nothing else."""
    return {
        **os.environ,
        "HF_ENDPOINT": server.url,
        "HF_HUB_CACHE": str(folder / "hf"),
        "HF_TOKEN_PATH": str(folder / "token"),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
    }


NAMES = list(small_llama(0))


def sharded(folder: Path, seed: int, rows: int = 7) -> Path:
    """A small Llama, each tensor of which is in a file of its own."""
    folder.mkdir()
    tensors, files = small_llama(seed, rows=rows), {}
    for number, (name, tensor) in enumerate(tensors.items(), 1):
        files[name] = f"model-{number:05}-of-{len(tensors):05}.safetensors"
        save_file({name: tensor.contiguous()}, folder / files[name])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {f"t{row}": row for row in range(rows)}}}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "code.py").write_text("CODE = 1\n")
    (folder / "README.md").write_text("a card")
    return folder


def shard(name: str) -> str:
    return f"model-{NAMES.index(name) + 1:05}-of-{len(NAMES):05}.safetensors"
