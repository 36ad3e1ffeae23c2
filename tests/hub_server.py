"""The few calls of the Hugging Face Hub that uploading and downloading a model need, on a local port."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

import yaml

COMMIT = "0" * 39 + "1"


def card_errors(content: str) -> list[str]:
    """What the Hub's validation would find wrong with the header of a model card."""
    card = yaml.safe_load(content.split("---")[1])
    errors = []
    if not isinstance(card.get("base_model", "a/b"), str) or card.get("base_model", "a/b").count("/") != 1:
        errors.append('"base_model" is no model id')
    if card.get("license") == "other" and not card.get("license_name"):
        errors.append('"license_name" is missing')
    if not all(isinstance(tag, str) for tag in card.get("tags", [])):
        errors.append('"tags" must be strings')
    for entry in card.get("widget", []):
        if not isinstance(entry.get("text"), str) or not isinstance(entry.get("output", {"url": ""}).get("url"), str):
            errors.append('"widget" has an entry without text or url')
    return errors


def commit_of(repository: str) -> str:
    """The commit of a revision: one of its own for each ``owner/name@revision``."""
    return hashlib.sha1(repository.encode()).hexdigest() if "@" in repository else COMMIT


def tree(files: dict[str, bytes], under: str, recursive: bool) -> list[dict[str, Any]]:
    """The Hub's listing of a folder: files with their size and id, and folders."""
    prefix = f"{under}/" if under else ""
    entries: dict[str, dict[str, Any]] = {}
    for name, content in files.items():
        if name.startswith(prefix):
            inside = name.removeprefix(prefix)
            if recursive or "/" not in inside:
                entries[name] = {"type": "file", "path": name, "rfilename": name, "size": len(content)}
            else:
                folder = prefix + inside.split("/")[0]
                entries[folder] = {"type": "directory", "path": folder}
    return [entry | {"oid": "0" * 40} for entry in entries.values()]


class Hub(ThreadingHTTPServer):
    """Repositories in memory: ``files`` maps a repository to its files, ``seen`` lists what was asked for.

    A revision other than main is the repository ``owner/name@revision``.
    """

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
            errors = [{"message": message} for message in card_errors(json.loads(body)["content"])]
            self.answer({"errors": errors, "warnings": []}, 400 if errors else 200)
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
        if parts[0] == "datasets":
            parts = parts[1:]
        repository = "/".join(parts[2:4]) if parts[0] == "api" else "/".join(parts[:2])
        revision = (
            parts[5] if parts[4:5] in (["revision"], ["tree"]) else parts[3] if parts[2:3] == ["resolve"] else "main"
        )
        for name in self.server.files:
            # A tag is asked for by its name first, and then by its commit.
            if name.startswith(f"{repository}@") and revision in (name.split("@")[1], commit_of(name)):
                repository = name
        files = self.server.files.get(repository)
        if files is None or revision not in ("main", commit_of(repository), repository.partition("@")[2]):
            self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        elif parts[0] == "api":
            entries = tree(files, "/".join(parts[6:]) if "tree" in parts else "", "recursive=false" not in self.path)
            info = {"id": repository, "sha": commit_of(repository), "siblings": entries, "private": False, "tags": []}
            self.answer(entries if "tree" in parts else info)
        else:
            name = "/".join(parts[4:])
            if name not in files:
                self.answer({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
                return
            etag = hashlib.sha1(files[name]).hexdigest()
            self.answer(files[name], headers={"ETag": f'"{etag}"', "X-Repo-Commit": commit_of(repository)})

    do_HEAD = do_GET
