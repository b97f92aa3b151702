"""A Hub on the loopback interface that can be written to, for the real client: repositories, branches, commits, LFS.

What it holds is in memory. It stands on the endpoints that `huggingface_hub` 1.x calls; a fault can be ordered.
"""

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, unquote, urlsplit

import hub_server


@dataclass
class Repo:
    """A repository: branches to commits, commits to files, files to blobs."""

    private: bool = False
    branches: dict = field(default_factory=dict)
    commits: dict = field(default_factory=dict)
    messages: list = field(default_factory=list)

    def files(self, revision):
        """The files of a branch or commit, None if there is no such."""
        return self.commits.get(self.branches.get(revision, revision))


class WritableHub:
    """What the server holds.

    Args:
        tokens: Names of users by their tokens.
    """

    def __init__(self, tokens):
        self.tokens = tokens
        self.repos = {}
        self.blobs = {}
        self.lock = threading.Lock()
        self.breaks_uploads = False
        self.requests = []
        self.endpoint = None

    def bytes_of(self, kind, repo_id, path, revision="main"):
        """A file as it lies there."""
        return self.blobs[self.repos[kind, repo_id].files(revision)[path]]

    def paths(self, kind, repo_id, revision="main"):
        """The names of the files."""
        return sorted(self.repos[kind, repo_id].files(revision))


class Handler(BaseHTTPRequestHandler):
    """Answers the client's requests."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Say nothing."""

    @property
    def hub(self):
        return self.server.hub

    def user(self):
        """The user whose token came along, None without one."""
        return self.hub.tokens.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))

    def send(self, status, content=None, headers=None, body=None):
        body = json.dumps(content).encode() if body is None else body
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status, code, message):
        self.send(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

    def read(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def route(self):
        """Answer a request, whatever its method."""
        url = urlsplit(self.path)
        parts = [unquote(part) for part in url.path.strip("/").split("/")]
        self.hub.requests.append((self.command, url.path))
        if parts == ["api", "whoami-v2"]:
            name = self.user()
            if name is None:
                self.refuse(401, "", "Invalid user token.")
            else:
                self.send(200, {"name": name, "type": "user", "orgs": [], "auth": {"type": "access_token"}})
        elif parts == ["api", "validate-yaml"]:
            self.read()
            self.send(200, {"errors": [], "warnings": []})
        elif parts == ["api", "repos", "create"]:
            self.create()
        elif parts[0] == "lfs":
            self.take_blob(parts[1])
        elif parts[0] == "api":
            if len(parts) < 4:  # of all repositories, or of one without an owner
                self.refuse(404, "RepoNotFound", "Repository not found.")
                return
            kind, owner, name, *rest = parts[1:]
            self.of_repo(kind.removesuffix("s"), f"{owner}/{name}", rest, parse_qs(url.query))
        elif url.path.endswith(".git/info/lfs/objects/batch"):
            self.offer_uploads()
        else:
            kind = parts.pop(0).removesuffix("s") if parts[0] in ("datasets", "spaces") else "model"
            owner, name, _, revision, *path = parts
            self.give_file(kind, f"{owner}/{name}", revision, "/".join(path))

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = route  # the library's names

    def create(self):
        given, user = json.loads(self.read()), self.user()
        if user is None:
            self.refuse(401, "", "Invalid username or password.")
            return
        repo_id = f"{given.get('organization') or user}/{given['name']}"
        key = given.get("type") or "model", repo_id
        with self.hub.lock:
            exists = key in self.hub.repos
            if not exists:
                repo = self.hub.repos[key] = Repo(
                    "private" in (given.get("visibility"), given.get("private") and "private")
                )
                repo.branches["main"], repo.commits["0" * 40] = "0" * 40, {}
        content = {"url": f"{self.hub.endpoint}/{repo_id}", "name": repo_id}
        if exists:
            self.send(409, {**content, "error": "You already created this model repo"})
        else:
            self.send(200, content)

    def repo(self, kind, repo_id):
        """A repository that may be seen; None once it is rejected."""
        repo = self.hub.repos.get((kind, repo_id))
        if repo is None or (repo.private and self.user() != repo_id.split("/")[0]):
            self.refuse(404 if self.user() else 401, "RepoNotFound", "Repository not found")
            return None
        return repo

    def of_repo(self, kind, repo_id, rest, query):
        body = self.read()
        repo = self.repo(kind, repo_id)
        if repo is None:
            return
        what, revision = rest[0] if rest else "revision", rest[1] if len(rest) > 1 else "main"
        if what in ("preupload", "commit", "branch") and self.user() != repo_id.split("/")[0]:
            self.refuse(403, "", "Forbidden: you have no write access")
            return
        if what == "preupload":
            files = json.loads(body)["files"]
            modes = [
                {
                    "path": each["path"],
                    "uploadMode": "lfs"
                    if each["path"].endswith((".safetensors", ".arrow", ".parquet"))
                    else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for each in files
            ]
            self.send(200, {"files": modes})
        elif what == "branch":
            exists = revision in repo.branches
            repo.branches.setdefault(revision, repo.branches["main"])
            self.send(409 if exists else 200, {"error": "Reference already exists"} if exists else {})
        elif what == "commit":
            self.commit(repo, repo_id, revision, body, bool(query.get("create_pr")))
        elif repo.files(revision) is None:
            self.refuse(404, "RevisionNotFound", "Invalid rev id")
        elif what == "tree":
            found = self.tree(repo, revision, "/".join(rest[2:]), query.get("recursive", [""])[0].lower() == "true")
            if len(rest) > 2 and not found:
                self.refuse(404, "EntryNotFound", "Entry not found")
            else:
                self.send(200, found)
        elif what == "paths-info":
            asked = json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode()).get("paths", [])
            self.send(200, [each for each in self.entries(repo, revision) if each["path"] in asked])
        else:
            siblings = [{"rfilename": path} for path in sorted(repo.files(revision))]
            sha = repo.branches.get(revision, revision)
            self.send(200, {"id": repo_id, "sha": sha, "siblings": siblings, "private": repo.private, "tags": []})

    def tree(self, repo, revision, folder, is_recursive):
        """Files and folders in a folder."""
        start = f"{folder}/" if folder else ""
        files = [each for each in self.entries(repo, revision) if each["path"].startswith(start)]
        names = {each["path"][len(start) :] for each in files}
        folders = {name.rpartition("/")[0] for name in names if "/" in name}
        if not is_recursive:
            files = [each for each in files if "/" not in each["path"][len(start) :]]
            folders = {name.partition("/")[0] for name in names if "/" in name}
        return files + [{"type": "directory", "path": start + name, "oid": "0" * 40} for name in sorted(folders)]

    def entries(self, repo, revision):
        """The files of a revision as the tree lists them."""
        return [
            {"type": "file", "path": path, "size": len(self.hub.blobs[blob]), "oid": blob[:40]}
            for path, blob in sorted(repo.files(revision).items())
        ]

    def commit(self, repo, repo_id, revision, body, is_pull_request):
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        with self.hub.lock:
            if is_pull_request:
                revision = f"refs/pr/{1 + sum(name.startswith('refs/pr/') for name in repo.branches)}"
                repo.branches[revision] = repo.branches["main"]
            files = dict(repo.files(revision) or {})
            for line in lines:
                value = line["value"]
                if line["key"] == "header":
                    message = value["summary"]
                elif line["key"] == "file":
                    content = base64.b64decode(value["content"])
                    blob = hashlib.sha256(content).hexdigest()
                    self.hub.blobs[blob] = content
                    files[value["path"]] = blob
                elif line["key"] == "lfsFile":
                    if value["oid"] not in self.hub.blobs:
                        self.refuse(400, "", "LFS pointer pointed to a file that does not exist")
                        return
                    files[value["path"]] = value["oid"]
                elif line["key"] == "deletedFile":
                    files.pop(value["path"], None)
            sha = hashlib.sha1(json.dumps([sorted(files.items()), len(repo.commits)]).encode()).hexdigest()
            repo.commits[sha], repo.branches[revision] = files, sha
            repo.messages.append(message)
        content = {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.endpoint}/{repo_id}/commit/{sha}"}
        if is_pull_request:
            content["pullRequestUrl"] = f"{self.hub.endpoint}/{repo_id}/discussions/{revision.rpartition('/')[2]}"
        self.send(200, content)

    def offer_uploads(self):
        objects = [
            {**each, "actions": {"upload": {"href": f"{self.hub.endpoint}/lfs/{each['oid']}"}}}
            if each["oid"] not in self.hub.blobs
            else each
            for each in json.loads(self.read())["objects"]
        ]
        self.send(200, {"transfer": "basic", "objects": objects})

    def take_blob(self, oid):
        if self.hub.breaks_uploads:
            self.rfile.read(min(1000, int(self.headers["Content-Length"])))
            self.close_connection = True
            self.connection.close()
            return
        content = self.read()
        assert hashlib.sha256(content).hexdigest() == oid
        self.hub.blobs[oid] = content
        self.send(200, {})

    def give_file(self, kind, repo_id, revision, path):
        repo = self.repo(kind, repo_id)
        if repo is None:
            return
        files = repo.files(revision)
        if files is None:
            self.refuse(404, "RevisionNotFound", "Invalid rev id")
        elif path not in files:
            self.refuse(404, "EntryNotFound", "Entry not found")
        else:
            content = self.hub.blobs[files[path]]
            headers = {"ETag": f'"{files[path]}"', "X-Repo-Commit": repo.branches.get(revision, revision)}
            headers |= {"X-Linked-Size": str(len(content)), "Content-Type": "application/octet-stream"}
            self.send(200, headers=headers, body=content)


serve = partial(hub_server.serve, handler=Handler)
