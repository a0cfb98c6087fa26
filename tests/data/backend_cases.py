"""Datasets of every backend: images as bytes, a survey of one dataset, and a server that fails."""

import io
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from data_fixtures import photo
from prepare_cases import config
from rich.progress import Progress

from fluxfast.data.survey import survey


def png(width=64, height=64, seed=0):
    stream = io.BytesIO()
    photo(width, height, seed).save(stream, format="PNG")
    return stream.getvalue()


def surveyed(tmp_path, **options):
    """The survey of one dataset with these keys."""
    folder = {"instance_data_dir": tmp_path / "copies"} if "origin" in options else {}
    with Progress(disable=True) as bars:
        found = survey(
            config(tmp_path, **{"resolution": 64} | folder | options),
            bars,
            disable_bucket_pruning=True,
        )
    (dataset,) = found.datasets
    return dataset


def captions(dataset):
    """The captions of each image that is used, by its file."""
    return {each.file: each.captions for each in dataset.scan.candidates}


def reasons(dataset):
    """Why images are left out, by their file."""
    return {each.file: f"{each.reason} {each.detail}".strip() for each in dataset.scan.skipped}


@contextmanager
def web(answers):
    """A server on this machine.

    `answers` maps a path to its content, or to "404", "500", "slow" or "broken"; it counts what is
    asked for in `server.asked`.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.asked.append(self.path)
            answer = answers.get(self.path, "404")
            if answer in ("404", "500"):
                self.send_error(int(answer))
                return
            if answer == "slow":
                time.sleep(1)
            content = answer if isinstance(answer, bytes) else png()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:20] if answer == "broken" else content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked = []
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
