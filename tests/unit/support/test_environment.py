"""Ports that stay free, and processes that are not taken for others."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from tests.support.environment import PART, PORTS, free_port, worker_ports
from tests.support.processes import Process, children


def test_no_two_workers_have_a_port_in_common_nor_with_what_linux_chooses() -> None:
    parts = [{*worker_ports(worker)} for worker in range(8)]
    assert len(set.union(*parts)) == sum(map(len, parts)) == len(PORTS)
    first, _ = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    assert max(PORTS) < 17100 < first


def test_a_port_that_is_taken_is_left_out() -> None:
    found = [free_port() for _ in range(20)]
    assert len({*found}) == 20
    with socket.create_server(("127.0.0.1", found[0])):
        round_trip = [free_port() for _ in range(PART - 1)]
    assert {*found[1:]} <= {*round_trip}
    assert found[0] not in round_trip


def test_a_process_is_known_by_more_than_its_number() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        (found,) = [process for process in children(os.getpid()) if process.pid == child.pid]
        assert found.alive
        assert not Process(child.pid, "1").alive, "another process had this number"
        Process(child.pid, "1").kill()
        assert child.poll() is None
        found.kill()
        assert child.wait(60) == -9
        assert not found.alive
        found.kill()
    finally:
        child.kill()
        child.communicate(timeout=60)
