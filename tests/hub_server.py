"""The few calls of the Hugging Face Hub that uploading and downloading a model need, on a local port."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

COMMIT = "0" * 39 + "1"


class Hub(ThreadingHTTPServer):
    """Repositories in memory: ``files`` maps a repository to its files, ``seen`` lists what was asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.seen: list[str] = []
        self.tokens: set[str | None] = set()
        self.refuses_commits = False
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        """What HF_ENDPOINT is set to."""
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.seen.append(f"POST {self.path}")
        self.server.tokens.add(self.headers.get("Authorization"))
        parts = self.path.split("?")[0].strip("/").split("/")
        if self.path == "/api/repos/create":
            name = f"someone/{json.loads(body)['name']}"
            self.server.files.setdefault(name, {})
            self.answer({"url": f"{self.server.url}/{name}", "id": name, "name": name})
        elif self.path == "/api/validate-yaml":
            bad = b"base_model: /" in body
            message = {"message": '"base_model" is no model id'}
            self.answer({"errors": [message] * bad, "warnings": []}, 400 if bad else 200)
        elif parts[-2] == "preupload":
            wanted = json.loads(body)["files"]
            self.answer(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in wanted]}
            )
        elif parts[-2] == "commit" and not self.server.refuses_commits:
            repository = "/".join(parts[2:4])
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.server.files[repository][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            self.answer({"success": True, "commitOid": COMMIT, "commitUrl": f"{self.server.url}/{repository}/commit/1"})
        else:
            self.answer({"error": "not here"}, 403)

    def do_GET(self) -> None:
        self.server.seen.append(f"{self.command} {self.path}")
        parts = [unquote(part) for part in self.path.split("?")[0].strip("/").split("/")]
        repository = "/".join(parts[2:4]) if parts[0] == "api" else "/".join(parts[:2])
        files = self.server.files.get(repository)
        if files is None:
            self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        elif parts[0] == "api":
            entries = [
                {"type": "file", "path": name, "rfilename": name, "size": len(content), "oid": "0" * 40}
                for name, content in files.items()
            ]
            info = {"id": repository, "sha": COMMIT, "siblings": entries, "private": False, "tags": []}
            self.answer(entries if "tree" in parts else info)
        else:
            name = "/".join(parts[4:])
            if name not in files:
                self.answer({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
                return
            etag = hashlib.sha1(files[name]).hexdigest()
            self.answer(files[name], headers={"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET
