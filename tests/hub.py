#!/usr/bin/env python3
"""A stand-in of the Hugging Face Hub and of S3: a few routes over folders of this machine, with faults on demand.

hub.py PORT FOLDER [HOST]: FOLDER/org/name/… are models, and FOLDER/faults.json says what goes wrong, read anew at each
request, as in {"bytes_per_s": 1000000, "cut_after": 65536, "damage": 2, "refuse": 503}:

    bytes_per_s   how slowly files come
    cut_after     every answer breaks off after so many bytes, though more were announced
    damage        so many answers for a weights file have a byte that is wrong
    refuse        this status for everything
    hang          files are announced and never come

Every request is a line in FOLDER/requests.log. Standard library only: it runs inside the test cluster, too.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit
from xml.sax.saxutils import escape

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CHUNK = 16384
LFS = (".safetensors",)


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], folder: Path) -> None:
        super().__init__(address, _Handler)
        self.folder = folder
        self.damaged = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://{self.server_address[0]}:{self.server_address[1]}"

    def faults(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads((self.folder / "faults.json").read_text())
        except (OSError, ValueError):
            return {}
        return found

    def requests(self) -> list[str]:
        with contextlib.suppress(OSError):
            return (self.folder / "requests.log").read_text().splitlines()
        return []

    def commit_of(self, name: str) -> str:
        """Of the model: another content is another commit."""
        file = self.folder / name / "commit"
        return file.read_text().strip() if file.exists() else COMMIT

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is no fault of ours."""


@contextlib.contextmanager
def running_hub(folder: Path) -> Iterator[Hub]:
    """The stand-in in this process, on a free port."""
    server = Hub(("127.0.0.1", 0), folder)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def set_faults(hub: Hub, **faults: object) -> None:
    (hub.folder / "faults.json").write_text(json.dumps(faults))


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url, faults = urlsplit(self.path), self.server.faults()
        with self.server.lock, (self.server.folder / "requests.log").open("a") as log:
            log.write(f"{self.command} {self.path} {self.headers.get('Range', '')}\n")
        if faults.get("refuse"):
            return self.send(int(faults["refuse"]), b"")
        parts = url.path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            return self.model("/".join(parts[2:4]), parts[4:])
        if parts[2:3] == ["resolve"]:
            return self.file(self.server.folder / "/".join(parts[:2]) / "/".join(parts[4:]), faults)
        if "list-type" in parse_qs(url.query):
            return self.bucket(url.path.strip("/"), parse_qs(url.query))
        return self.file(self.server.folder / url.path.strip("/"), faults)

    def model(self, name: str, rest: list[str]) -> None:
        folder, commit = self.server.folder / name, self.server.commit_of(name)
        if not folder.is_dir():
            return self.send(404, b"", {"X-Error-Code": "RepoNotFound"})
        if (folder / "gated").exists() and self.headers.get("Authorization") != "Bearer right":
            return self.send(403, b"", {"X-Error-Code": "GatedRepo"})
        if rest[:1] == ["revision"] and rest[1] not in ("main", commit):
            return self.send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        siblings = []
        for path in sorted(folder.iterdir()):
            if path.name in ("commit", "gated"):
                continue
            entry: dict[str, Any] = {"rfilename": path.name, "size": path.stat().st_size, "blobId": digest(path, "git")}
            if path.name.endswith(LFS):
                entry["lfs"] = {"sha256": digest(path, "sha256"), "size": path.stat().st_size, "pointerSize": 1}
            siblings.append(entry)
        document = {"id": name, "sha": commit, "siblings": siblings, "private": False, "tags": []}
        return self.send(200, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def bucket(self, bucket: str, query: dict[str, list[str]]) -> None:
        prefix = query.get("prefix", [""])[0]
        entries = [
            f"<Contents><Key>{escape(prefix + path.name)}</Key><Size>{path.stat().st_size}</Size>"
            f"<ETag>&quot;{digest(path, 'md5')}&quot;</ETag></Contents>"
            for path in sorted((self.server.folder / bucket / prefix).glob("*"))
        ]
        body = f'<?xml version="1.0"?><ListBucketResult xmlns="http://s3/">{"".join(entries)}</ListBucketResult>'
        return self.send(200, body.encode(), {"Content-Type": "application/xml"})

    def file(self, path: Path, faults: dict[str, Any]) -> None:
        if not path.is_file():
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
        total, start = path.stat().st_size, 0
        with self.server.lock:
            damaged = path.name.endswith(LFS) and self.server.damaged < faults.get("damage", 0)
            if damaged and self.command == "GET":
                self.server.damaged += 1
        headers = {"ETag": f'"{digest(path, "sha256")}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if (wanted := self.headers.get("Range", "")).startswith("bytes="):
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
            if start >= total:
                return self.send(416, b"")
            headers["Content-Range"] = f"bytes {start}-{total - 1}/{total}"
        self.send_response(206 if start else 200)
        for name, value in {**headers, "Content-Length": str(total - start), "Connection": "close"}.items():
            self.send_header(name, value)
        self.end_headers()
        self.close_connection = True
        if self.command == "HEAD":
            return
        if faults.get("hang"):
            time.sleep(600)
        cut, rate = faults.get("cut_after"), faults.get("bytes_per_s")
        end = total if cut is None else min(total, start + cut)
        with path.open("rb") as stream:
            stream.seek(start)
            for at in range(start, end, CHUNK):
                piece = stream.read(min(CHUNK, end - at))
                if damaged and at + len(piece) == end:
                    piece = piece[:-1] + bytes([piece[-1] ^ 1])
                if rate:
                    time.sleep(len(piece) / rate)
                self.wfile.write(piece)

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def digest(path: Path, kind: str) -> str:
    stat = path.stat()
    return _digest(path, kind, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(1000)
def _digest(path: Path, kind: str, size: int, changed: int) -> str:
    """Of files of a quarter of a gigabyte, asked for at every request."""
    content = path.read_bytes()
    if kind == "git":
        return hashlib.sha1(b"blob %d\0" % size + content).hexdigest()
    return hashlib.new(kind, content).hexdigest()


if __name__ == "__main__":
    port, folder = int(sys.argv[1]), Path(sys.argv[2])
    Hub((sys.argv[3] if len(sys.argv) > 3 else "127.0.0.1", port), folder).serve_forever()
