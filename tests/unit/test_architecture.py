"""The rules of the house: imports go downward, one module each knows the big libraries, help answers at once."""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
import time

import pytest

from tests.support.environment import REPO, environment

PACKAGE = REPO / "cpsp_dist"
LAYERS = [
    {"__main__"},
    {"cli"},
    {"launch", "doctor", "demo", "bench", "export"},
    {"train", "api"},
    {"training"},
    {"packing", "tracking"},
    {"config"},
    {"losses", "metrics"},
    {"models"},
    {"data"},
    {"distributed", "utils"},
    {"errors"},
]
#: The one module that may import each.
KNOWN_BY = {"deepspeed": "training", "mlflow": "tracking", "submitit": "launch"}


def imports():
    """(room, file, imported dotted name) of every import in the package, also those inside functions."""
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield room, path, alias.name
            elif isinstance(node, ast.ImportFrom) and node.module:
                if node.module == "cpsp_dist":
                    for alias in node.names:
                        yield room, path, f"cpsp_dist.{alias.name}"
                else:
                    yield room, path, node.module


def level(room: str) -> int:
    for number, layer in enumerate(LAYERS):
        if room in layer:
            return number
    pytest.fail(f"cpsp_dist/{room} has no layer; add it to LAYERS and to docs/architecture.md")


def test_imports_go_downward():
    wrong = []
    for room, path, name in imports():
        parts = name.split(".")
        if parts[0] != "cpsp_dist" or len(parts) == 1 or parts[1] == "__version__" or room == "__init__":
            continue
        if parts[1] != room and level(parts[1]) < level(room):
            wrong.append(f"{path.relative_to(REPO)} imports {name}")
    assert not wrong


def test_one_module_knows_each_big_library():
    wrong = [
        f"{path.relative_to(REPO)} imports {name}"
        for room, path, name in imports()
        if name.split(".")[0] in KNOWN_BY and KNOWN_BY[name.split(".")[0]] != room
    ]
    assert not wrong


@pytest.mark.timing
@pytest.mark.parametrize(
    "command",
    [
        ["cpsp_dist", "--help"],
        ["cpsp_dist", "shards", "pack", "--help"],
        ["cpsp_dist", "launch", "--help"],
        ["cpsp_dist", "doctor", "--help"],
        ["cpsp_dist.train", "--help"],
    ],
    ids=" ".join,
)
def test_help_answers_in_half_a_second(command):
    """Measured against a bare interpreter's start in the same run, so that a busy machine does not decide."""

    def seconds(arguments: list[str]) -> float:
        began = time.perf_counter()
        subprocess.run([sys.executable, *arguments], env=environment(), check=True, capture_output=True, timeout=60)
        return time.perf_counter() - began

    bare, helped = [], []
    for _ in range(5):
        bare.append(seconds(["-c", "import argparse"]))
        helped.append(seconds(["-m", *command]))
    assert statistics.median(helped) < max(0.5, 6 * statistics.median(bare))


@pytest.mark.parametrize("module", ["cpsp_dist", "cpsp_dist.cli", "cpsp_dist.train"])
def test_help_imports_nothing_heavy(module):
    code = f"import {module}, sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), check=True, capture_output=True, text=True, timeout=60
    )
    heavy = {"torch", "numpy", "deepspeed", "mlflow", "accelerate", "webdataset", "pydantic", "yaml", "h5py"}
    assert not heavy & set(done.stdout.split())


def test_packing_processes_do_without_torch():
    """Each of them would spend seconds on its import."""
    modules = "cpsp_dist.packing.pack, cpsp_dist.packing.source"
    code = f"import {modules}, sys; print(*{{'torch', 'webdataset'}} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), check=True, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == ""


def test_the_install_brings_one_package(tmp_path):
    """Outside the checkout: its other folders (shards/ has modules) are nobody's imports."""
    code = "from importlib.util import find_spec; print([bool(find_spec(name)) for name in ('cpsp_dist', 'shards')])"
    env = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=tmp_path, check=True, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "[True, False]"


def test_no_path_of_a_machine_is_committed():
    listed = subprocess.run(["git", "ls-files"], cwd=REPO, check=True, capture_output=True, text=True, timeout=60)
    for name in listed.stdout.splitlines():
        text = (REPO / name).read_text(encoding="utf-8", errors="replace")
        for path in ("/wo" + "rk/", "/ro" + "ot/", "/tmp/scr" + "atch"):
            assert path not in text, name
