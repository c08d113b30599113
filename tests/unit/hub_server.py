"""A small server that speaks what the hub's client asks for, on this machine.

Repositories lie in memory: `{owner/name: {file: bytes}}`.
"""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
from urllib.parse import unquote

COMMIT = "0" * 40
TOKEN = "hf_of_a_test"


class Hub:
    """The repositories, and what was asked.

    `answer_with`: a status that every write is answered with instead.
    `large`: files from this size on go the way of large ones (LFS).
    """

    def __init__(self, repositories=None, large=1 << 20):
        self.repositories = dict(repositories or {})
        self.large, self.answer_with = large, None
        self.asked, self.downloaded, self.objects = [], [], {}
        self.endpoint = None

    def answer(self, method, path, body, headers):
        """Return status, headers and content."""
        self.asked.append(f"{method} {path}")
        if method in ("GET", "HEAD"):
            return self.read(path)
        if self.answer_with is not None:
            return self.answer_with, {}, b"{}"
        if path == "/api/validate-yaml":
            return self.json({"errors": [], "warnings": []})
        if method != "PUT" and headers.get("Authorization") != (
            f"Bearer {TOKEN}"
        ):
            return 401, {}, b'{"error": "Invalid username or password."}'
        return self.write(path, body)

    def json(self, content, status=200):
        body = json.dumps(content).encode()
        return status, {"Content-Type": "application/json"}, body

    def read(self, path):
        found = re.match(r"/(api/models/)?([^/]+/[^/]+?)(/.*)?$", path)
        name, rest = found[2], found[3] or ""
        files = self.repositories.get(name)
        if files is None:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        if found[1] and "/tree/" in rest:
            return self.json(
                [
                    {"type": "file", "path": f, "size": len(b), "oid": "0" * 40}
                    for f, b in files.items()
                ]
            )
        if found[1]:
            siblings = [{"rfilename": file} for file in files]
            more = {"id": name, "sha": COMMIT, "siblings": siblings}
            return self.json(more)
        file = rest.split("/", 3)[-1]
        if file not in files:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        self.downloaded.append(file)
        tag = hashlib.sha256(files[file]).hexdigest()
        headers = {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT}
        return 200, headers, files[file]

    def write(self, path, body):
        if path.startswith("/upload/"):
            self.objects[path.rpartition("/")[2]] = body
            return 200, {}, b""
        if found := re.match(r"/api/models/(.+/.+)/commit/main$", path):
            return self.commit(found[1], body)
        asked = json.loads(body)
        if path == "/api/repos/create":
            owner = asked.get("organization")
            name = f"{owner}/{asked['name']}" if owner else asked["name"]
            if name in self.repositories:
                text = {"error": "You already created this model repo"}
                text["url"] = f"{self.endpoint}/{name}"
                return self.json(text, status=409)
            self.repositories[name] = {".gitattributes": b""}
            return self.json({"url": f"{self.endpoint}/{name}", "id": name})
        if "/preupload/" in path:
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs"
                    if file["size"] >= self.large
                    else "regular",
                    "shouldIgnore": False,
                }
                for file in asked["files"]
            ]
            return self.json({"files": modes})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {
                    "oid": entry["oid"],
                    "size": entry["size"],
                    "actions": {
                        "upload": {
                            "href": f"{self.endpoint}/upload/{entry['oid']}"
                        }
                    },
                }
                for entry in asked["objects"]
            ]
            return self.json({"transfer": "basic", "objects": objects})
        return 404, {}, b"{}"

    def commit(self, name, body):
        files = self.repositories[name]
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        url = f"{self.endpoint}/{name}/commit/{COMMIT}"
        return self.json(
            {"success": True, "commitOid": COMMIT, "commitUrl": url}
        )


@contextlib.contextmanager
def serving(hub):
    """Serve a `Hub`; yield its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments):
            pass

        def body(self):
            if self.headers.get("Transfer-Encoding") == "chunked":
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def reply(self):
            path = unquote(self.path.partition("?")[0])
            status, headers, content = hub.answer(
                self.command, path, self.body(), self.headers
            )
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = do_POST = do_PUT = reply

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub.endpoint
    finally:
        server.shutdown()
        server.server_close()
