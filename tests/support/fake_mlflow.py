"""A server that may be anything but an MLflow server: what it replies to each request is up to a test."""

from __future__ import annotations

import json
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

#: (connection, path of the request, number of the request): send what you like, or nothing.
Reply = Callable[[Any, str, int], None]

RUN: dict[str, Any] = {
    "info": {
        "run_id": "0123456789abcdef0123456789abcdef",
        "run_uuid": "0123456789abcdef0123456789abcdef",
        "run_name": "a-seed1",
        "experiment_id": "1",
        "status": "FINISHED",
        "start_time": 1764115200000,
        "artifact_uri": "mlflow-artifacts:/1/0123456789abcdef0123456789abcdef/artifacts",
        "lifecycle_stage": "active",
    },
    "data": {
        "metrics": [{"key": "accuracy/test", "value": 71.5, "timestamp": 1764115200000, "step": 6}],
        "params": [{"key": "train.seed", "value": "1"}],
        "tags": [{"key": "output", "value": "runs/a"}],
    },
}
EXPERIMENT = {"experiment_id": "1", "name": "cpsp", "artifact_location": "x", "lifecycle_stage": "active"}
#: What MLflow answers, by the end of the path.
ANSWERS: dict[str, Any] = {
    "experiments/get-by-name": {"experiment": EXPERIMENT},
    "experiments/search": {"experiments": [EXPERIMENT]},
    "runs/search": {"runs": [RUN]},
    "runs/create": {"run": RUN},
    "runs/get": {"run": RUN},
    "runs/update": {"run_info": RUN["info"]},
    "metrics/get-history": {"metrics": []},
    "artifacts/list": {"files": []},
}


def good(path: str) -> bytes:
    return json.dumps(next((answer for end, answer in ANSWERS.items() if path.endswith(end)), {})).encode()


def http(status: int, body: bytes, kind: str = "application/json") -> bytes:
    head = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return head.encode() + body


@contextmanager
def fake_mlflow(reply: Reply) -> Iterator[str]:
    """Its URL, while the `with` lasts."""
    ended = threading.Event()
    count = iter(range(10**9))

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            try:
                line = self.rfile.readline().decode(errors="replace")
                length = 0
                while (header := self.rfile.readline()).strip():
                    name, _, value = header.partition(b":")
                    length = int(value) if name.lower() == b"content-length" else length
                self.body = self.rfile.read(length)
                path = (line.split() + ["", ""])[1].partition("?")[0]
                reply(self, path, next(count))
            except OSError:
                pass  # the client has gone

        def send(self, data: bytes) -> None:
            self.wfile.write(data)

        def wait(self, seconds: float) -> bool:
            """Whether the test has ended meanwhile."""
            return ended.wait(seconds)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads, allow_reuse_address, block_on_close = True, True, False

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            ended.set()
            server.shutdown()
