"""A hub on this machine for the tests of `tandem pull`: models in memory, served as huggingface.co serves them (redirects of
large files to another host, entity tags, ranges, error codes), with faults on demand."""
import collections
import hashlib
import http.server
import json
import re
import threading
import urllib.parse


def git_name(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Repository:
    """`files`: name to bytes. Those of more than `lfs_from` bytes are large: they have a SHA-256 and live elsewhere."""

    def __init__(self, files, lfs_from=1000, private=False, gated=False):
        self.files, self.lfs_from, self.private, self.gated = files, lfs_from, private, gated
        self.commit = hashlib.sha1(repr(sorted((n, git_name(d)) for n, d in files.items())).encode()).hexdigest()
        self.revisions = {"main": self.commit, self.commit: self.commit}
        self.info = {}  # members that replace those of the description

    def is_large(self, name):
        return len(self.files[name]) > self.lfs_from

    def etag(self, name):
        data = self.files[name]
        return hashlib.sha256(data).hexdigest() if self.is_large(name) else git_name(data)


class Hub:
    """`faults[METHOD, part of a path]`: a list; each request for that takes one away. "cut N": N bytes, then the connection
    ends; "status N" or ("status N", headers); "wrong": other bytes; "stall"; "whole": ignores the range; "size N"."""

    TOKEN = "hf_right"

    def __init__(self):
        self.repositories, self.faults = {}, collections.defaultdict(list)
        self.requests = []  # (method, path, headers) of all hosts
        self.release = threading.Event()  # ends what stalls
        self.servers = [http.server.ThreadingHTTPServer(("127.0.0.1", 0), self.handler(cdn)) for cdn in (False, True)]
        for server in self.servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        self.url, self.cdn = (f"http://127.0.0.1:{s.server_port}" for s in self.servers)
        self.cdn = self.cdn.replace("127.0.0.1", "localhost")  # another host, for whom the token is not meant

    def close(self):
        self.release.set()
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def fault(self, method, path):
        for (wanted, part), queue in self.faults.items():
            if wanted == method and part in path and queue:
                return queue.pop(0)
        return None

    def handler(hub, cdn):  # noqa: N805 (self is the handler's own)
        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_HEAD(self):
                self.answer()

            def do_GET(self):
                self.answer()

            def reply(self, status, body=b"", **headers):
                self.send_response(status)
                headers.setdefault("Content_Length", len(body))
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), str(value))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def error(self, status, code, text):
                self.reply(status, json.dumps({"error": text}).encode(), X_Error_Code=code, X_Error_Message=text)

            def answer(self):
                path = urllib.parse.urlsplit(self.path).path
                hub.requests.append((self.command, path, dict(self.headers)))
                self.trouble = hub.fault(self.command, path) or ""
                extra = {}
                if isinstance(self.trouble, tuple):
                    self.trouble, extra = self.trouble
                if self.trouble.startswith("status"):
                    return self.reply(int(self.trouble.split()[1]), b"no", **extra)
                if self.trouble == "stall":
                    hub.release.wait(60)
                    self.close_connection = True
                    return None
                if cdn:
                    repository, name = hub.stored[path]
                    return self.send_file(repository.files[name], f'"{"0" * 32}"')
                match = re.match(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/]+)$", path)
                if match:
                    return self.describe(*match.groups())
                match = re.match(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)$", path)
                if match:
                    return self.resolve(*match.groups())
                return self.error(404, "RepoNotFound", "Repository not found")

            def find(self, model, revision):
                """The repository, or None when an error was sent."""
                repository = hub.repositories.get(model)
                token = self.headers.get("Authorization")
                if token and token != f"Bearer {hub.TOKEN}":
                    self.error(401, "", "Invalid username or password.")
                elif repository is None or (repository.private and not token):
                    self.error(404 if token else 401, "RepoNotFound", "Repository not found")
                elif urllib.parse.unquote(revision) not in repository.revisions:
                    self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
                else:
                    return repository
                return None

            def describe(self, model, kind, revision):
                repository = self.find(model, revision)
                if repository is None:
                    return None
                if kind == "revision":
                    info = {"id": model, "modelId": model, "sha": repository.revisions[urllib.parse.unquote(revision)],
                            "siblings": [{"rfilename": n} for n in repository.files]} | repository.info
                    return self.reply(200, json.dumps(info).encode())
                tree = []
                for name, data in repository.files.items():
                    entry = {"type": "file", "path": name, "size": len(data), "oid": git_name(data)}
                    if repository.is_large(name):
                        entry["lfs"] = {"oid": repository.etag(name), "size": len(data), "pointerSize": 130}
                    tree.append(entry)
                return self.reply(200, json.dumps(tree).encode())

            def resolve(self, model, revision, name):
                repository = self.find(model, revision)
                if repository is None:
                    return None
                name = urllib.parse.unquote(name)
                if name not in repository.files:
                    return self.error(404, "EntryNotFound", "Entry not found")
                if repository.gated and self.headers.get("Authorization") != f"Bearer {hub.TOKEN}":
                    return self.error(401, "GatedRepo", f"Access to model {model} is restricted.")
                data, etag = repository.files[name], repository.etag(name)
                commit = {"X_Repo_Commit": repository.revisions[urllib.parse.unquote(revision)]}
                if not repository.is_large(name):
                    return self.send_file(data, f'"{etag}"', **commit)
                size = int(self.trouble.split()[1]) if self.trouble.startswith("size") else len(data)
                hub.stored[f"/{etag}"] = repository, name
                return self.reply(302, b"Found", Location=f"{hub.cdn}/{etag}", X_Linked_Etag=f'"{etag}"',
                                  X_Linked_Size=size, ETag='"not this one"', **commit)

            def send_file(self, data, etag, **headers):
                start, status = 0, 200
                asked = re.match(r"bytes=(\d+)-$", self.headers.get("Range", ""))
                if asked and self.trouble != "whole":
                    start, status = int(asked[1]), 206
                    if start >= len(data):
                        return self.reply(416, b"", Content_Range=f"bytes */{len(data)}")
                    headers["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
                body = data[start:]
                if self.trouble == "wrong":
                    body = bytes(b ^ 1 for b in body)
                if self.trouble.startswith("cut") and self.command == "GET":
                    n = int(self.trouble.split()[1])
                    self.close_connection = True
                    self.reply(status, body[:n], ETag=etag, Content_Length=len(body), **headers)
                    if self.trouble.endswith("stall"):
                        self.wfile.flush()
                        hub.release.wait(60)
                    return None
                return self.reply(status, body, ETag=etag, Accept_Ranges="bytes", **headers)

        hub.stored = {}
        return Handler
