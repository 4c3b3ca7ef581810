"""A stand-in for huggingface.co on loopback: fake_hub.py prints its URL, and ends with its stdin.

Repositories: org/open, org/slow (large, and slow), org/slower, org/sharded, org/gated (needs the token
hf_good), org/vast (a file larger than any disk), org/broken (500). Others do not exist. The request
`GET /-/stats` tells how much was asked for, and how many files were sent.
"""
import hashlib
import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

MIB = 1 << 20
SHA = "0123456789abcdef0123456789abcdef01234567"
stats = {"bodies": 0, "asked": 0}


def content(name, size):
    return (name.encode() * (size // len(name) + 1))[:size]


PLAIN = {"config.json": b'{"model_type": "tiny"}', "tokenizer.json": b"{}", "README.md": b"read me"}
WEIGHTS = {
    "model.safetensors": content("model.safetensors", 6 * MIB),
    "pytorch_model.bin": content("pytorch_model.bin", 6 * MIB),
    "original/consolidated.00.pth": content("original", 6 * MIB),
}
SHARDS = {f"model-0000{n}-of-00002.safetensors": content(f"shard {n} ", MIB) for n in (1, 2)}
REPOS = {
    "org/open": {**PLAIN, **WEIGHTS},
    # More than a buffer of the client's (10 MB), so that its progress shows.
    "org/slow": {**PLAIN, "model.safetensors": content("slow", 48 * MIB)},
    "org/slower": {**PLAIN, "model.safetensors": content("slower", 48 * MIB)},
    "org/gated": {**PLAIN, **WEIGHTS},
    "org/sharded": {**PLAIN, **SHARDS},
    "org/vast": {**PLAIN, "model.safetensors": b"x"},
    "org/broken": {},
}
# Seconds after every 4 MiB.
PAUSES = {"org/slow": 0.2, "org/slower": 1}
VAST = 1 << 60


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", headers=()):
        self.send_response(status)
        sized = {name.lower() for name, _ in headers}
        if "content-length" not in sized:
            self.send_header("Content-Length", str(len(body)))
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status, code, message):
        self.answer(status, b"{}", [("X-Error-Code", code), ("X-Error-Message", message)])

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = [unquote(part) for part in urlparse(self.path).path.strip("/").split("/")]
        if path == ["-", "stats"]:
            return self.answer(200, json.dumps(stats).encode())
        stats["asked"] += 1
        api = path[:2] == ["api", "models"]
        repo = "/".join(path[2:4] if api else path[:2])
        if repo == "org/broken":
            return self.answer(500, b"oops")
        if repo not in REPOS:
            # As the hub does for the anonymous, who may not know whether it exists.
            known = self.headers.get("Authorization") is not None
            return self.refuse(404 if known else 401, "RepoNotFound", "Repository not found")
        if api:
            return self.describe(repo, path[4:])
        return self.file(repo, path[3], "/".join(path[4:]))

    def describe(self, repo, rest):
        if rest[:1] == ["revision"] and rest[1] not in ("main", SHA):
            return self.refuse(404, "RevisionNotFound", "Invalid rev id: " + rest[1])
        siblings = [self.sibling(repo, name) for name in REPOS[repo]]
        if rest[:1] == ["tree"]:
            files = [
                {"type": "file", "path": s["rfilename"], "oid": s["blobId"], "size": s["size"],
                 **({"lfs": {"oid": s["lfs"]["sha256"], "size": s["size"], "pointerSize": 1}} if "lfs" in s else {})}
                for s in siblings
            ]
            return self.answer(200, json.dumps(files).encode(), [("Content-Type", "application/json")])
        about = {"_id": "1", "id": repo, "modelId": repo, "sha": SHA, "private": False, "siblings": siblings,
                 "gated": "auto" if repo == "org/gated" else False, "tags": [], "downloads": 0, "likes": 0}
        self.answer(200, json.dumps(about).encode(), [("Content-Type", "application/json")])

    def sibling(self, repo, name):
        body = REPOS[repo][name]
        size = VAST if (repo, name) == ("org/vast", "model.safetensors") else len(body)
        about = {"rfilename": name, "size": size, "blobId": hashlib.sha1(body).hexdigest()}
        if name.endswith((".safetensors", ".bin", ".pth")):
            about["lfs"] = {"sha256": hashlib.sha256(body).hexdigest(), "size": size, "pointerSize": 1}
        return about

    def file(self, repo, revision, name):
        if repo == "org/gated" and self.headers.get("Authorization") != "Bearer hf_good":
            status = 403 if self.headers.get("Authorization") else 401
            return self.refuse(status, "GatedRepo", f"Access to model {repo} is restricted")
        if name not in REPOS[repo]:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        body, about = REPOS[repo][name], self.sibling(repo, name)
        etag = about.get("lfs", {}).get("sha256") or about["blobId"]
        headers = [("ETag", f'"{etag}"'), ("X-Repo-Commit", SHA), ("Content-Length", str(len(body)))]
        if self.command == "HEAD" or repo not in PAUSES:
            if self.command != "HEAD":
                stats["bodies"] += 1
            return self.answer(200, body, headers)
        stats["bodies"] += 1
        self.answer(200, b"", headers)
        for at in range(0, len(body), 4 * MIB):
            self.wfile.write(body[at : at + 4 * MIB])
            time.sleep(PAUSES[repo])


class Server(ThreadingHTTPServer):
    def handle_error(self, *_):
        """Clients that hang up are no news."""


server = Server(("127.0.0.1", 0), Handler)
server.daemon_threads = True
threading.Thread(target=server.serve_forever, daemon=True).start()
print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
while os.read(0, 4096):
    pass
