"""Web servers of the tests, on loopback: one by aiohttp, which fails on request, and a real nginx."""

from __future__ import annotations

import asyncio
import base64
import os
import re
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol

from aiohttp import web

from tests.support.environment import free_port
from tests.support.skips import skip

#: How a request is answered in place of the file: (request, path of the file, first byte, end).
Fault = Callable[[web.Request, Path, int, int], Awaitable[web.StreamResponse]]


class Site(Protocol):
    """A folder at `url`; also at `/private/`, with user `me` and password `s3cret`."""

    folder: Path
    port: int
    url: str

    def stop(self) -> None: ...


class AiohttpServer:
    """A `Site` in a thread of its own. `faults` are looked through for each GET; requests are listed as they arrive."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requests: list[tuple[str, int, int]] = []  # path, first byte, end
        self.faults: list[tuple[str, int, Fault]] = []  # of which path, for how many more requests, what
        self.lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._runner = web.AppRunner(self._application(), access_log=None, shutdown_timeout=0.1)
        self._thread = threading.Thread(target=self._loop.run_forever, name="aiohttp server", daemon=True)
        self._thread.start()
        self.port = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(20)
        self.url = f"http://127.0.0.1:{self.port}"

    def fault(self, path: str, fault: Fault, times: int = 10**6, after: int = 0) -> None:
        """Answer the next `times` requests for a path that ends like this by `fault`, `after` good ones."""
        if after:
            self.faults.append((path, after, good))
        self.faults.append((path, times, fault))

    def ranges(self, path: str) -> list[tuple[int, int]]:
        """Of the requests for a path that ends like this."""
        with self.lock:
            return [(first, end) for asked, first, end in self.requests if asked.endswith(path)]

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(20)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(20)
        self._loop.close()

    def _application(self) -> web.Application:
        application = web.Application()
        application.router.add_get("/private/{path:.*}", self._private)
        application.router.add_get("/{path:.*}", self._answer)
        return application

    async def _start(self) -> int:
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        return int(self._runner.addresses[0][1])

    async def _private(self, request: web.Request) -> web.StreamResponse:
        user = "Basic " + base64.b64encode(b"me:s3cret").decode()
        if request.headers.get("Authorization") != user:
            return web.Response(status=401, headers={"WWW-Authenticate": 'Basic realm="all"'})
        return await self._answer(request)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        path = self.folder / request.match_info["path"]
        if request.method != "GET":
            return await good(request, path, 0, 0)
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", ""))
        first, end = (int(asked[1]), int(asked[2]) + 1) if asked else (0, -1)
        with self.lock:
            self.requests.append((request.path, first, end))
        return await self._take_fault(request.path)(request, path, first, end)

    def _take_fault(self, path: str) -> Fault:
        with self.lock:
            for number, (end, left, fault) in enumerate(self.faults):
                if path.endswith(end):
                    self.faults[number] = (end, left - 1, fault)
                    if left == 1:
                        del self.faults[number]
                    return fault
        return good


# What may happen to a request:


async def good(request: web.Request, path: Path, first: int, end: int) -> web.StreamResponse:
    """By aiohttp's own file server, which knows ranges and HEAD."""
    return web.FileResponse(path) if path.is_file() else web.Response(status=404)


async def busy(request: web.Request, path: Path, first: int, end: int) -> web.StreamResponse:
    return web.Response(status=503, body=b"try again")


async def cut(request: web.Request, path: Path, first: int, end: int) -> web.StreamResponse:
    """Half of the answer, then the connection is reset."""
    body = path.read_bytes()[first:end]
    return await _broken(request, body[: len(body) // 2], len(body), reset=True)


async def too_long_announced(request: web.Request, path: Path, first: int, end: int) -> web.StreamResponse:
    """Content-Length is 100 more than the bytes that come, and the connection ends as if all had been sent."""
    body = path.read_bytes()[first:end]
    return await _broken(request, body, len(body) + 100, reset=False)


async def too_short_announced(request: web.Request, path: Path, first: int, end: int) -> web.StreamResponse:
    """Content-Length is half of what was asked for; the connection carries the rest of it as well, then ends."""
    body = path.read_bytes()[first:end]
    head = f"HTTP/1.1 206 Partial Content\r\nContent-Length: {len(body) // 2}\r\n\r\n"
    assert request.transport is not None
    request.transport.write(head.encode() + body)
    return await _broken(request, b"", 0, reset=False)


async def garbled(request: web.Request, path: Path, first: int, end: int) -> web.StreamResponse:
    """Something that is not HTTP."""
    assert request.transport is not None
    request.transport.write(b"\x00\x01 busy\r\n\r\n")
    return await _broken(request, b"", 0, reset=False)


async def without_ranges(request: web.Request, path: Path, first: int, end: int) -> web.StreamResponse:
    """A server that knows no ranges."""
    return web.Response(body=path.read_bytes())


async def damaged(request: web.Request, path: Path, first: int, end: int) -> web.StreamResponse:
    """One bit of each answer is wrong."""
    body = path.read_bytes()
    part = bytes([body[first] ^ 1]) + body[first + 1 : end]
    content_range = {"Content-Range": f"bytes {first}-{first + len(part) - 1}/{len(body)}"}
    return web.Response(status=206, body=part, headers=content_range)


def shortened(to: int) -> Fault:
    """A file that is only `to` bytes long at the server."""

    async def fault(request: web.Request, path: Path, first: int, end: int) -> web.StreamResponse:
        if first >= to:
            return web.Response(status=416)
        return web.Response(status=206, body=path.read_bytes()[first : min(end, to)])

    return fault


def held(reached: threading.Event, gate: threading.Event, sent: int = 0) -> Fault:
    """After `sent` bytes the answer waits for `gate`; `reached` is set once it waits."""

    async def fault(request: web.Request, path: Path, first: int, end: int) -> web.StreamResponse:
        response = web.StreamResponse(status=206)
        if sent:
            response.content_length = end - first
            await response.prepare(request)
            await response.write(path.read_bytes()[first : first + sent])
        reached.set()
        await asyncio.to_thread(gate.wait, 60)
        if not sent:
            return await good(request, path, first, end)
        await response.write(path.read_bytes()[first + sent : end])
        return response

    return fault


async def _broken(request: web.Request, body: bytes, length: int, reset: bool) -> web.StreamResponse:
    """`body` under a Content-Length of `length`, then the end of the connection."""
    response = web.StreamResponse(status=206)
    response.content_length = length
    if body:
        await response.prepare(request)
        await response.write(body)
    assert request.transport is not None
    if reset:
        connection = request.transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        request.transport.abort()
    else:
        request.transport.close()
    return response


class Nginx:
    """A `Site` by nginx, in a process of its own."""

    def __init__(self, binary: str, folder: Path, work: Path) -> None:
        self.folder, self.port = folder, free_port()
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
        # `timeout`, so that it ends even if the tests were killed.
        command = ["timeout", "1800", binary, "-e", f"{work}/error.log", "-p", str(work), "-c", f"{work}/nginx.conf"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        limit = time.monotonic() + 20
        while True:  # it does not report that it is ready; until then a connection is refused
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                log = (work / "error.log").read_text() if (work / "error.log").exists() else ""
                assert self.process.poll() is None, log
                assert time.monotonic() < limit, f"nginx does not answer: {log}"
                time.sleep(0.01)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=20)


def nginx_binary() -> str:
    """Skips the test where nginx is not installed, fails it if CPSP_REQUIRE_NGINX is set."""
    binary = shutil.which("nginx")
    if binary is None:
        skip("nginx", "it is not on the PATH (it may lie in /usr/sbin)")
    return binary
