"""A local server that speaks the Hub's API as far as an upload needs it."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_" + "t" * 34


class Hub:
    """Repositories in memory: `files` by path, `commits` by message, every request's path.

    failing: answers to give before the usual ones, by a part of the request's path: a list of
    statuses, each of them used once, or "hang up".
    losing: how many answers are lost on their way, once what was asked for is done, likewise.
    """

    def __init__(self):
        self.files, self.commits, self.requests = {}, [], []
        self.made, self.blobs, self.failing, self.losing = {}, {}, {}, {}
        self.account = {
            "type": "user", "name": "jane", "orgs": [{"name": "club"}],
            "auth": {"type": "access_token", "accessToken": {"role": "write"}},
        }  # fmt: skip
        self.dead = False
        # commits wait for it
        self.open = threading.Event()
        self.open.set()
        self.waiting = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        """End it; connections that are open are answered no more."""
        self.dead = True
        self.open.set()
        self.server.shutdown()
        self.server.server_close()

    def answer(self, path, body):
        """(status, JSON) of a request."""
        if path == "/api/whoami-v2":
            return 200, self.account
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'jane'}/{asked['name']}"
            if name in self.made:
                return 409, {"error": "exists", "url": f"{self.address}/{name}"}
            self.made[name] = asked.get("visibility", "public")
            return 200, {"url": f"{self.address}/{name}"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/main)?", path):
            if match[1] not in self.made:
                return 404, {"error": "Repository not found"}
            private = self.made[match[1]] == "private"
            return 200, {"id": match[1], "private": private, "sha": "1" * 40}
        if "/preupload/" in path:
            modes = [
                {"path": each["path"], "shouldIgnore": False, "oid": self.object_id(each["path"]),
                 "uploadMode": "regular" if is_regular(each["path"]) else "lfs"}
                for each in json.loads(body)["files"]
            ]  # fmt: skip
            return 200, {"files": modes}
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                each | {"actions": {"upload": {"href": f"{self.address}/blob/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}
        if path.startswith("/blob/"):
            assert hashlib.sha256(body).hexdigest() == path.rpartition("/")[2]
            self.blobs[path.rpartition("/")[2]] = body
            return 200, {}
        if "/commit/" in path:
            return self.commit(path, [json.loads(line) for line in body.splitlines()])
        return 404, {"error": f"no such page: {path}"}

    def object_id(self, path):
        """What the Hub knows a file by: Git's own hash, or the content's where LFS keeps it."""
        if (content := self.files.get(path)) is None:
            return None
        if is_regular(path):
            return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return hashlib.sha256(content).hexdigest()

    def commit(self, path, lines):
        self.waiting.set()
        assert self.open.wait(60)
        for line in lines if not self.dead else ():
            value = line["value"]
            if line["key"] == "header":
                self.commits.append(value["summary"])
            elif line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            else:
                self.files[value["path"]] = self.blobs[value["oid"]]
        return 200, {"commitUrl": f"{self.address}/jane/x/commit/1", "commitOid": "1" * 40}


def is_regular(path):
    """Whether a file is a part of the commit, and not kept by LFS."""
    return path.endswith((".md", ".json"))


def _handler(hub):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def respond(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            hub.requests.append(path)
            if hub.dead:
                self.close_connection = True
                return None
            for part, answers in hub.failing.items():
                if part in path and answers:
                    answer = answers.pop(0)
                    if answer == "hang up":
                        self.close_connection = True
                        return None
                    return self.send(answer, {"error": f"made to fail with {answer}"})
            if not path.startswith("/blob/"):
                told = self.headers.get("Authorization")
                if told != f"Bearer {TOKEN}":
                    return self.send(401, {"error": "Invalid username or password."})
            answer = hub.answer(path, body)
            for part, times in hub.losing.items():
                if part in path and times:
                    hub.losing[part] -= 1
                    self.close_connection = True
                    return None
            if hub.dead:
                self.close_connection = True
                return None
            return self.send(*answer)

        def send(self, status, content):
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_HEAD = respond

        def log_message(self, *args):
            pass

    return Handler
