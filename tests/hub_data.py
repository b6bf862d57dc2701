"""As much of the Hub's interface as streaming a data set needs, on this machine: the files of a
folder `OWNER/NAME/...` by commit, listings, and parts of files."""

from __future__ import annotations

import http.server
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class StubHandler(http.server.BaseHTTPRequestHandler):
    """What stubs of the Hub share: answers with a length, HEAD as GET without a body, no log."""

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, *_: object) -> None:
        """Quiet."""


class DataHub(StubHandler):
    """root: the folder."""

    root: Path

    def _answer_json(self, content: object) -> None:
        self._answer(200, json.dumps(content).encode(), Content_Type="application/json")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        name, rest = self._named("/api/datasets/")
        try:
            asked = json.loads(body)["paths"]
        except ValueError:
            asked = parse_qs(body.decode())["paths"]
        assert rest.startswith("paths-info/"), self.path
        paths = [self.root / name / path for path in asked]
        self._answer_json([self._entry(name, path) for path in paths if path.exists()])

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        api = path.startswith("/api/")
        name, rest = self._named("/api/datasets/" if api else "/datasets/")
        if not (self.root / name).is_dir():
            self._answer(404, X_Error_Code="RepoNotFound")
        elif not api:
            self._send_file(self.root / name / rest.split("/", 2)[2])
        elif rest.startswith("tree/"):
            folder = self.root / name / "/".join(rest.split("/")[2:])
            found = sorted(folder.iterdir()) if folder.is_dir() else []
            if found:
                self._answer_json([self._entry(name, path) for path in found])
            else:
                self._answer(404, X_Error_Code="EntryNotFound")
        else:
            files = [path for path in (self.root / name).rglob("*") if path.is_file()]
            siblings = [{"rfilename": self._entry(name, path)["path"]} for path in sorted(files)]
            self._answer_json({"_id": "1", "id": name, "sha": COMMIT, "siblings": siblings})

    def _named(self, prefix: str) -> tuple[str, str]:
        """`OWNER/NAME` and what follows."""
        path = self.path.partition("?")[0].removeprefix(prefix)
        match = re.match(r"([^/]+/[^/]+)/?(.*)", path)
        return (match[1], match[2]) if match else (path, "")

    def _entry(self, name: str, path: Path) -> dict[str, object]:
        relative = path.relative_to(self.root / name).as_posix()
        if path.is_dir():
            return {"type": "directory", "path": relative, "oid": "b" * 40}
        return {"type": "file", "path": relative, "size": path.stat().st_size, "oid": "a" * 40}

    def _send_file(self, path: Path) -> None:
        if not path.is_file():
            self._answer(404, X_Error_Code="EntryNotFound")
            return
        data, status, more = path.read_bytes(), 200, {}
        if match := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(match[1]), min(int(match[2] or len(data)), len(data) - 1)
            more = {"Content_Range": f"bytes {first}-{last}/{len(data)}"}
            data, status = data[first : last + 1], 206
        self._answer(status, data, ETag=f'"{path.name}"', X_Repo_Commit=COMMIT, **more)


@contextmanager
def data_hub(root: Path) -> Iterator[str]:
    """A Hub with the data sets of a folder: its address for HF_ENDPOINT."""
    with served(type("Handler", (DataHub,), {"root": root})) as endpoint:
        yield endpoint


@contextmanager
def served(handler: type[StubHandler]) -> Iterator[str]:
    """The address of a server with these answers, for HF_ENDPOINT."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
