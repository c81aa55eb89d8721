"""A small Hugging Face Hub on 127.0.0.1: what snapshot_download and upload_folder ask for, and ways to fail.

    with Hub({"models": {"owner/name": {"main": {"config.json": b"{}"}}}, "datasets": {}}) as hub:
        ...  # a process started with HF_ENDPOINT=hub.url: huggingface_hub reads its environment once, when imported
        assert not any(path.endswith(".bin") for method, path in hub.requests)

The dictionary reads kind, repository, revision, path, bytes; a test may change it between downloads. A revision must
hold a file: an empty one makes the client list the folder tree, which is not served. What the real Hub refuses:

    unknown repository   404 RepoNotFound; 401 to who sends no token, because it might be private
    `hub.private`        repositories that answer as unknown ones until a token is sent; any token opens them
    `hub.gated`          repositories that show their file list to all, their files only to who sends a token
    unknown revision     404 RevisionNotFound
    unknown file         404 EntryNotFound; a listed file cannot be missing, so `snapshot_download` never sees it

And what networks do:

    `hub.cut = N`        every download of more than N bytes breaks after N, until `hub.cut` is None again; the client
                         keeps whole pieces of 10 MiB to resume from, so below that it starts the file anew
    after the `with`     nothing listens at `hub.url`: the Hub is down, or there is no way to it

One header is added. The real Hub answers 401 without X-Error-Code and the client takes any 401 from an https address
for a missing repository; this one is http, so the code must be there to end in the same RepositoryNotFoundError.
Files come from here directly, without the real Hub's redirect to its storage and without Xet.
"""

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

INFO = re.compile(r"/api/(models|datasets)/(.+?)/revision/([^/]+)()")  # kind, repository, revision, no file
FILE = re.compile(r"/(?:(datasets)/)?(.+?)/resolve/([^/]+)/(.+)")  # the same, and a file; models have no prefix


def sha(name, revision):
    """The commit that a revision points at: it follows from the names alone, not from the files."""
    return hashlib.sha1(f"{name}@{revision}".encode()).hexdigest()


class Hub:
    """Serves `repos` at `url` while the `with` lasts; `requests` [(method, path as sent)] and `tokens` record it."""

    def __init__(self, repos):
        self.repos, self.requests, self.tokens = repos, [], set()
        self.private, self.gated, self.cut, self.refuses = set(), set(), None, None
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.hub = self
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


class Handler(BaseHTTPRequestHandler):
    """One request, one connection (HTTP/1.0): an answer shorter than its Content-Length is a broken connection."""

    def do_GET(self):
        hub, path = self.server.hub, urlsplit(self.path).path
        hub.requests.append((self.command, self.path))
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        hub.tokens |= {token} - {""}
        if path == "/api/whoami-v2":
            known = token == "hf_known"
            return self.answer(200, b'{"name": "owner"}') if known else self.refuse(401, "", "Invalid credentials")
        match = INFO.fullmatch(path) or FILE.fullmatch(path)
        if not match:
            return self.refuse(404, "", f"the small Hub does not know {path}")
        kind, name, revision, file = map(unquote, match.groups(default="models"))
        revisions = hub.repos.get(kind, {}).get(name)
        if revisions is None or (name in hub.private and not token):
            status, why = (404, "Repository not found") if token else (401, "Invalid username or password.")
            return self.refuse(status, "RepoNotFound", why)
        revision = next((known for known in revisions if revision in (known, sha(name, known))), None)
        if revision is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {unquote(match[3])}")
        files, headers = revisions[revision], {"X-Repo-Commit": sha(name, revision)}
        if not file:
            info = {"id": name, "sha": sha(name, revision), "siblings": [{"rfilename": path} for path in files]}
            return self.answer(200, json.dumps(info).encode())
        if name in hub.gated and not token:
            return self.refuse(401, "GatedRepo", f"Access to {name} is restricted. Please log in.", headers)
        if file not in files:
            return self.refuse(404, "EntryNotFound", "Entry not found", headers)
        headers |= {"ETag": f'"{hashlib.sha256(files[file]).hexdigest()}"', "Accept-Ranges": "bytes"}
        status, body, size = 200, files[file], len(files[file])
        if asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):  # the rest of a half download
            status, body = 206, body[int(asked[1]) :]
            headers["Content-Range"] = f"bytes {asked[1]}-{size - 1}/{size}"
        self.answer(status, body, headers, hub.cut)

    do_HEAD = do_GET

    def do_POST(self):
        """What an upload asks for: who sends the token, a new repository, how each file is to be sent, and the commit.

        `hub.refuses` holds a status for everything but the first question, in place of an answer.
        """
        hub, path = self.server.hub, urlsplit(self.path).path
        hub.requests.append((self.command, self.path))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub.tokens |= {self.headers.get("Authorization", "").removeprefix("Bearer ")} - {""}
        if hub.refuses:
            return self.refuse(hub.refuses, "", "not now")
        if path == "/api/repos/create":
            said = json.loads(body)
            name = f"{said['organization']}/{said['name']}" if said.get("organization") else said["name"]
            hub.repos["models"].setdefault(name, {"main": {}})
            if said.get("private") or said.get("visibility") == "private":
                hub.private.add(name)
            return self.answer(200, json.dumps({"url": f"{hub.url}/{name}", "id": name}).encode())
        if path == "/api/validate-yaml":
            return self.answer(200, b'{"errors": [], "warnings": []}')
        kind, name = re.fullmatch(r"/api/models/(.+?)/(?:(preupload|commit)/main)", path).group(2, 1)
        if kind == "preupload":
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for file in json.loads(body)["files"]]  # fmt: skip
            return self.answer(200, json.dumps({"files": files}).encode())
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                hub.repos["models"][name]["main"][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        oid = sha(name, "main")
        said = {
            "success": True,
            "commitUrl": f"{hub.url}/{name}/commit/{oid}",
            "commitOid": oid,
            "pullRequestUrl": None,
        }
        self.answer(200, json.dumps(said).encode())

    def refuse(self, status, code, message, headers=()):
        headers = dict(headers) | {"X-Error-Code": code, "X-Error-Message": message}
        self.answer(status, json.dumps({"error": message}).encode(), headers)

    def answer(self, status, body, headers=(), cut=None):
        self.send_response(status)
        for name, value in {**dict(headers), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut])

    def log_message(self, *_):
        """Nothing on stderr: `hub.requests` is the log."""
