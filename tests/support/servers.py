"""Web servers of the tests: a real nginx on loopback, and a front before it that misbehaves on request."""

from __future__ import annotations

import http.client
import os
import re
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.support.environment import free_port


class Nginx:
    """Serves `folder` at `url`; also at `/private/`, with user `me` and password `s3cret`."""

    def __init__(self, binary: str, folder: Path, work: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        work.mkdir()
        (work / "users").write_text("me:{PLAIN}s3cret\n")
        temporary = "".join(f"{kind}_temp_path {work}/{kind};" for kind in ("client_body", "proxy", "fastcgi"))
        temporary += "".join(f"{kind}_temp_path {work}/{kind};" for kind in ("uwsgi", "scgi"))
        (work / "nginx.conf").write_text(
            f"daemon off; worker_processes 1; pid {work}/pid; error_log {work}/error.log;\n"
            + ("user root;\n" if os.geteuid() == 0 else "")
            + f"events {{}} http {{ access_log off; {temporary} server {{ listen 127.0.0.1:{self.port};\n"
            + f"root {folder}; location /private/ {{ alias {folder}/; auth_basic all;"
            + f" auth_basic_user_file {work}/users; }} }} }}\n"
        )
        # `timeout`, so that it ends even where the tests were killed.
        command = ["timeout", "1800", binary, "-e", f"{work}/error.log", "-p", str(work), "-c", f"{work}/nginx.conf"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        limit = time.monotonic() + 20
        while True:  # it tells nobody that it is ready; until then a connection is refused
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                told = (work / "error.log").read_text() if (work / "error.log").exists() else ""
                assert self.process.poll() is None, told
                assert time.monotonic() < limit, f"nginx does not answer: {told}"
                time.sleep(0.01)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=20)


#: What the front does with a request in place of handing on nginx's answer.
Fault = Callable[["_Handler"], None]


class Front:
    """A proxy before nginx. `faults` are looked through for each GET; requests are listed as they come in."""

    def __init__(self, nginx: Nginx) -> None:
        self.nginx = nginx
        self.requests: list[tuple[str, int, int]] = []  # path, first byte, end
        self.faults: list[tuple[str, int, Fault]] = []  # of which path, for how many more requests, what
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self.server.daemon_threads = True
        self.server.front = self
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def fault(self, path: str, fault: Fault, times: int = 10**6, after: int = 0) -> None:
        """Answer the next `times` requests for a path that ends like this by `fault`, `after` good ones."""
        if after:
            self.faults.append((path, after, _Handler.hand_on))
        self.faults.append((path, times, fault))

    def take_fault(self, path: str) -> Fault:
        with self.lock:
            for number, (end, left, fault) in enumerate(self.faults):
                if path.endswith(end):
                    self.faults[number] = (end, left - 1, fault)
                    if left == 1:
                        del self.faults[number]
                    return fault
        return _Handler.hand_on

    def ranges(self, path: str) -> list[tuple[int, int]]:
        """Of the requests for a path that ends like this."""
        with self.lock:
            return [(first, end) for asked, first, end in self.requests if asked.endswith(path)]

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    front: Front

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.hand_on()

    def do_GET(self) -> None:
        front: Front = self.server.front
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        self.first, last = map(int, match.groups()) if match else (0, -2)
        with front.lock:
            front.requests.append((self.path, self.first, last + 1))
        front.take_fault(self.path)(self)

    def answer(self, **headers: str) -> tuple[http.client.HTTPResponse, bytes]:
        """nginx's."""
        nginx = http.client.HTTPConnection("127.0.0.1", self.server.front.nginx.port, timeout=20)
        passed = {k: v for k, v in self.headers.items() if k.lower() in ("range", "authorization")}
        nginx.request(self.command, self.path, headers=passed | headers)
        response = nginx.getresponse()
        body = response.read()
        nginx.close()
        return response, body

    def send(self, status: int, body: bytes, length: int | None = None, content_range: str | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        if content_range:
            self.send_header("Content-Range", content_range)
        self.end_headers()
        self.wfile.write(body)

    # What may happen to a request:

    def hand_on(self) -> None:
        response, body = self.answer()
        length = int(response.headers["Content-Length"])
        self.send(response.status, body, length, response.headers.get("Content-Range"))

    def busy(self) -> None:
        self.send(503, b"try again")

    def cut(self) -> None:
        """Half of the answer, then the connection is reset."""
        response, body = self.answer()
        self.send(response.status, body[: len(body) // 2], len(body), response.headers.get("Content-Range"))
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def whole(self) -> None:
        """A server that knows no ranges."""
        nginx = http.client.HTTPConnection("127.0.0.1", self.server.front.nginx.port, timeout=20)
        nginx.request("GET", self.path)
        self.send(200, nginx.getresponse().read())
        nginx.close()

    def damaged(self) -> None:
        """One bit of each answer is wrong."""
        response, body = self.answer()
        self.send(response.status, bytes([body[0] ^ 1]) + body[1:], None, response.headers.get("Content-Range"))


def shortened(to: int) -> Fault:
    """A file that is only `to` bytes long at the server."""

    def fault(handler: _Handler) -> None:
        if handler.first >= to:
            handler.send(416, b"")
        else:
            handler.send(206, handler.answer()[1][: to - handler.first])

    return fault


def held(reached: threading.Event, gate: threading.Event) -> Fault:
    """The answer waits for `gate`; `reached` tells that somebody waits for it."""

    def fault(handler: _Handler) -> None:
        reached.set()
        gate.wait(60)
        try:
            handler.hand_on()
        except OSError:  # who asked is gone
            handler.close_connection = True

    return fault


busy, cut, whole, damaged = _Handler.busy, _Handler.cut, _Handler.whole, _Handler.damaged
