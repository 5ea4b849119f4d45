"""A model hub on this machine: serves folders over the part of the protocol that the hub's client uses."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34
GATED = "gated/model"


@contextmanager
def hub(repositories: dict[str, Path]) -> Iterator[tuple[str, list[str]]]:
    """Serve `repositories` (OWNER/NAME -> folder); its address, and the list of the files that were asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_) -> None:
            pass

        def answer(self, code: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(code)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            parts = unquote(urlsplit(self.path).path).strip("/").split("/")
            api = parts[:2] == ["api", "models"]
            name, rest = "/".join(parts[2:4] if api else parts[:2]), parts[4:] if api else parts[2:]
            folder = repositories.get(name)
            if folder is None:
                code, error = (403, "GatedRepo") if name == GATED else (404, "RepoNotFound")
                return self.answer(code, X_Error_Code=error)
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            if api:
                entries = [{"type": "file", "path": str(path.relative_to(folder)), "size": path.stat().st_size,
                            "oid": hashlib.sha1(path.read_bytes()).hexdigest()} for path in files]
                told = entries if rest[:1] == ["tree"] else {
                    "id": name, "sha": COMMIT, "siblings": [{"rfilename": entry["path"]} for entry in entries]}
                return self.answer(200, json.dumps(told).encode(), Content_Type="application/json")
            file = folder.joinpath(*rest[2:])
            if rest[:1] != ["resolve"] or file not in files:
                return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
            if self.command == "GET":
                asked.append(f"{name}/{file.relative_to(folder)}")
            data = file.read_bytes()
            return self.answer(200, data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=COMMIT)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
