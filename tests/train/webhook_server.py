"""A web server on this machine that gets a run's events."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# seconds; no test waits so long, unless it fails
LONG = 60
SECRET = "hush-hush"


class Server(ThreadingHTTPServer):
    """Keeps every post that it gets; `answer` is called with the handler to answer one."""

    daemon_threads = True

    def __init__(self, port=0):
        super().__init__(("127.0.0.1", port), Handler)
        self.posts, self.arrived = [], threading.Condition()
        self.answer = answers(204)
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/{SECRET}"

    def wait_for(self, number):
        """The posts, once there are so many."""
        with self.arrived:
            assert self.arrived.wait_for(lambda: len(self.posts) >= number, LONG)
            return list(self.posts)

    def __exit__(self, *error):
        self.stop()

    def stop(self):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.arrived:
            self.server.posts.append((self.headers, body))
            self.server.arrived.notify_all()
        self.server.answer(self)

    def log_message(self, *args):
        pass


def answers(status, **headers):
    def answer(handler):
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


def hangs_up(handler):
    handler.close_connection = True
    handler.connection.close()
