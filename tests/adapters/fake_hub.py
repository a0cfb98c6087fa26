"""A Hugging Face Hub on this machine, as far as downloading files of one repository asks for it."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """`files` are the repository's, by name; `requests` are those that came, as (method, path)."""

    def __init__(self, repository: str, files: dict[str, bytes]) -> None:
        self.repository, self.files, self.requests = repository, files, []
        self.url = ""

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body for a path."""
        api, tree = f"/api/models/{self.repository}", f"/api/models/{self.repository}/tree/"
        if path.startswith(tree):
            listing = [
                {
                    "type": "file",
                    "path": name,
                    "size": len(data),
                    "oid": hashlib.sha1(data).hexdigest(),
                }
                for name, data in self.files.items()
            ]
            return 200, {}, json.dumps(listing).encode()
        if path == api or path.startswith(f"{api}/revision/"):
            siblings = [{"rfilename": name} for name in self.files]
            info = {
                "id": self.repository,
                "modelId": self.repository,
                "sha": COMMIT,
                "siblings": siblings,
                "tags": [],
            }
            return 200, {}, json.dumps(info).encode()
        for revision in ("main", COMMIT):
            resolve = f"/{self.repository}/resolve/{revision}/"
            if path.startswith(resolve):
                data = self.files.get(path.removeprefix(resolve))
                if data is None:
                    return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b""
                return (
                    200,
                    {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT},
                    data,
                )
        return 404, {"X-Error-Code": "RepoNotFound"}, b""


@contextmanager
def serving(hub: FakeHub) -> Iterator[None]:
    """Answer requests at `hub.url` for as long as the block runs."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append((self.command, path))
            status, headers, body = hub.answer(path)
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=partial(server.serve_forever, poll_interval=0.01))
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()
