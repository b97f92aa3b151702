"""A Hub on the loopback interface that serves folders, for the real client: reading only, with its refusals."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def commit_of(revision):
    """The commit that a revision stands for."""
    return "1" * 40 if revision.startswith("refs/") or revision == "1" * 40 else COMMIT


class HubHandler(BaseHTTPRequestHandler):
    """Answers the requests that loading makes."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Say nothing."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        # A revision may have a slash, which is quoted: split first.
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if parts[:2] == ["api", "models"]:
            owner, name, *rest = parts[2:]
            self.answer_api(f"{owner}/{name}", rest)
        else:
            owner, name, _, revision, *rest = parts
            self.answer_file(f"{owner}/{name}", revision, "/".join(rest))

    def refuse(self, status, code, message):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def folder_of(self, repo_id, revision):
        """The folder of a repository; None once it is rejected."""
        hub = self.server.hub
        if repo_id in hub.gated and self.headers.get("Authorization") != f"Bearer {hub.gated[repo_id]}":
            self.refuse(403, "GatedRepo", "Access to model is restricted")
        elif repo_id not in hub.repos:
            self.refuse(404, "RepoNotFound", "Repository not found")
        elif commit_of(revision) != COMMIT and f"{repo_id}@refs/pr/1" in hub.repos:
            return hub.repos[f"{repo_id}@refs/pr/1"]
        elif revision not in ("main", COMMIT):
            self.refuse(404, "RevisionNotFound", "Invalid rev id")
        else:
            return hub.repos[repo_id]
        return None

    def answer_pulls(self, repo_id):
        """List the pull requests: those whose files are served."""
        pulls = [name for name in self.server.hub.repos if name.startswith(f"{repo_id}@refs/pr/")]
        found = [
            {
                "title": "Adding `safetensors` variant of this model",
                "num": int(name.rpartition("/")[2]),
                "author": {"name": "someone"},
                "createdAt": "2024-06-26T00:00:00.000Z",
                "status": "open",
                "repo": {"name": repo_id, "type": "model"},
                "isPullRequest": True,
            }
            for name in pulls
        ]
        content = {"count": len(found), "start": 0, "discussions": found}
        self.send_body(json.dumps(content).encode(), "application/json", {})

    def answer_api(self, repo_id, rest):
        if rest == ["discussions"]:
            self.answer_pulls(repo_id)
            return
        revision = rest[1] if len(rest) > 1 else "main"
        folder = self.folder_of(repo_id, revision)
        if folder is None:
            return
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = [path.relative_to(folder).as_posix() for path in files]
        if rest and rest[0] == "tree":
            content = [
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": "0" * 40}
                for name, path in zip(names, files, strict=True)
            ]
        else:
            content = {"id": repo_id, "sha": commit_of(revision), "siblings": [{"rfilename": name} for name in names]}
        self.send_body(json.dumps(content).encode(), "application/json", {})

    def answer_file(self, repo_id, revision, name):
        folder = self.folder_of(repo_id, revision)
        if folder is None:
            return
        path = folder / name
        if not path.is_file():
            self.refuse(404, "EntryNotFound", "Entry not found")
            return
        if self.command == "GET":
            self.server.hub.downloads.append(f"{repo_id}/{name}")
        body = path.read_bytes()
        etag = hashlib.sha256(body).hexdigest()
        self.send_body(body, "application/octet-stream", {"ETag": f'"{etag}"', "X-Repo-Commit": commit_of(revision)})

    def send_body(self, body, kind, headers):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


class LoopbackHub:
    """What the server serves, and what was downloaded.

    Args:
        repos: Folders by the id of the repository; that of a pull request by `ID@refs/pr/1`.
        gated: Tokens that open gated repositories, by id.
    """

    def __init__(self, repos, gated=None):
        self.repos = {name: Path(folder) for name, folder in repos.items()}
        self.gated = gated or {}
        self.downloads = []
        self.endpoint = None


@contextmanager
def serve(hub, handler=HubHandler):
    """Serve a hub until the context ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.hub, server.daemon_threads = hub, True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
