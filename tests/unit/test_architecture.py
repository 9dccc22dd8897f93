"""The architecture rules: imports go downward, one module each knows the big libraries, one place for each helper."""

from __future__ import annotations

import ast
import functools
import re
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest

from tests.support.environment import REPO, environment

PACKAGE = REPO / "cpsp_dist"
LAYERS = [
    {"__main__"},
    {"cli"},
    {"launch", "doctor", "demo", "bench"},
    {"train", "api"},
    {"inference"},
    {"training", "report"},
    {"packing", "extraction", "tracking"},
    {"config"},
    {"losses", "metrics"},
    {"models"},
    {"data"},
    {"distributed"},
    {"utils"},
]
#: The one module that may import each.
KNOWN_BY = {"deepspeed": "training", "mlflow": "tracking", "submitit": "launch"}


@functools.cache
def modules(folder: str = "cpsp_dist") -> dict[str, ast.Module]:
    """Every file of the package or of `tests`, by its path in it."""
    files = sorted((REPO / folder).rglob("*.py"))
    return {str(path.relative_to(REPO / folder)): ast.parse(path.read_text()) for path in files}


def imports():
    """(room, file, imported dotted name) of every import in the package, also those inside functions."""
    for name, tree in modules().items():
        path, room = PACKAGE / name, Path(name).parts[0].removesuffix(".py")
        for node in ast.walk(tree):
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


def test_few_imports_between_packages():
    """A change stays in one folder where few others know it. 161 when the package had 35 folders and modules."""
    arrows = {
        (room, name.split(".")[1])
        for room, path, name in imports()
        if name.startswith("cpsp_dist.") and name.split(".")[1] not in (room, "__version__")
    }
    later = {"__init__", "extraction", "inference", "report"}  # what was not there yet
    assert len(arrows) <= 115
    assert sum(later.isdisjoint(arrow) for arrow in arrows) <= 80


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


# Sizes and names


def test_few_names_at_the_top():
    names = [path for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()]
    assert len([path for path in names if not path.name.startswith("__")]) <= 22


def test_each_folder_says_what_belongs_there():
    """The first line of its `__init__` says what it is, the paragraph below what belongs there."""
    wrong = []
    for path, tree in modules().items():
        if path.endswith("/__init__.py"):
            first, _, rest = (ast.get_docstring(tree) or "").partition("\n\n")
            if "\n" in first or not first.endswith(".") or not re.search(r"\bbelongs?\s+here\b", rest.split("\n\n")[0]):
                wrong.append(path)
    assert not wrong


#: function or constructor (file:name) -> why it is longer than 60 lines or takes more than 8 arguments
LARGE_FUNCTIONS: dict[str, str] = {}
#: file -> why it has more than 300 lines
LARGE_FILES: dict[str, str] = {}


def test_functions_and_files_are_small():
    """self and cls do not count; a dataclass names its fields, so it may have more."""
    functions, files = set(), set()
    for path, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                given = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                arguments = [each.arg for each in given if each.arg not in ("self", "cls")]
                if node.end_lineno - node.lineno >= 60 or len(arguments) > 8:
                    functions.add(f"{path}:{node.name}")
        if len((PACKAGE / path).read_text().splitlines()) > 300:
            files.add(path)
    assert functions == LARGE_FUNCTIONS.keys()
    assert files == LARGE_FILES.keys()


def test_a_name_means_one_thing():
    """No two classes have one name; nor have two modules a function of a name that once stood for several things."""
    classes, functions = defaultdict(list), defaultdict(list)
    for path, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                classes[node.name].append(path)
            elif isinstance(node, ast.FunctionDef) and node.name in ("plan", "describe", "dry_run"):
                functions[node.name].append(path)
    twice = {name for name, paths in [*classes.items(), *functions.items()] if len(paths) > 1}
    assert not twice


@functools.cache
def _names_of_files(folder: str) -> dict[Path, set[str]]:
    """Folder of the package or of `tests` -> the modules and packages in it."""
    found: dict[Path, set[str]] = defaultdict(set)
    for path in map(Path, modules(folder)):
        found[path.parent].add(path.stem)
        found[path.parent.parent].add(path.parent.name)
    return found


@functools.cache
def _offered(name: str) -> set[str] | None:
    """The names at the top of a module of ours; None where there is no such module, or it makes some on demand."""
    folder, _, inside = name.partition(".")
    path = inside.replace(".", "/")
    tree = modules(folder).get(f"{path}.py") or modules(folder).get(f"{path}/__init__.py".lstrip("/"))
    if tree is None:
        return None
    found = set(_names_of_files(folder)[Path(path)])
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


def test_what_is_imported_exists():
    """Also inside functions, which no test may reach, and in the tests."""
    wrong = []
    for path, tree in [*modules().items(), *modules("tests").items()]:
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("cpsp_dist", "tests"):
                offered = _offered(node.module)
                wrong += [
                    f"{path}: {node.module}.{alias.name}"
                    for alias in node.names
                    if offered is None or (alias.name not in offered and "__getattr__" not in offered)
                ]
    assert not wrong


# One of each helper


def _called(node: ast.AST) -> str:
    """`os.replace(a, b)` -> "os.replace"; a method of something else -> ".replace"."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return ""
    owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
    return f"{owner if owner in ('os', 'shutil', 'socket', 'files') else ''}.{node.func.attr}"


def _renames(node: ast.AST) -> bool:
    """Path.replace takes one argument; str.replace takes two, dataclass and datetime ones keywords."""
    called = _called(node)
    return called in ("os.replace", "os.rename", "os.renames", "shutil.move", ".rename") or (
        called == ".replace" and len(node.args) == 1 and not node.keywords
    )


def _imports_hashlib(node: ast.AST) -> bool:
    return (isinstance(node, ast.Import) and any(alias.name == "hashlib" for alias in node.names)) or (
        isinstance(node, ast.ImportFrom) and node.module == "hashlib"
    )


def _constants(node: ast.AST) -> set[object]:
    return {each.value for each in ast.walk(node) if isinstance(each, ast.Constant)}


#: what is done -> how it is recognised, and the modules that may (with the reason where it is not the helper itself)
HELPERS = {
    "atomic write": (
        _renames,
        {
            "utils/files.py": "",
            "utils/logs.py": "moves a full log aside",
            "training/run_lock.py": "takes a lock that is stale aside",
        },
    ),
    "sync": (
        lambda node: _called(node) in ("os.fsync", "os.fdatasync"),
        {"utils/files.py": "", "data/cache.py": "of a descriptor", "bench/loader.py": "of a page cache"},
    ),
    "hash": (
        _imports_hashlib,
        {
            "utils/hashing.py": "",
            "packing/index.py": "hashes a tar as it is parsed: read once",
            "packing/tar.py": "the same",
            "packing/plan.py": "a shuffle's keys, not a checksum",
        },
    ),
    "port": (
        lambda node: _called(node) in (".bind", "socket.create_server"),
        {},
    ),
    "port of a job": (
        lambda node: isinstance(node, ast.Constant) and node.value == 12000,
        {"distributed/launchers.py": ""},
    ),
    "size in bytes": (
        lambda node: isinstance(node, ast.FunctionDef) and {" GB", " MB"} <= _constants(node),
        {"utils/text.py": ""},
    ),
    "one line of an error": (
        lambda node: (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).startswith("str(error)")
            and ast.unparse(node.func).endswith((".splitlines", ".split"))
        ),
        {"utils/text.py": "", "launch/cluster.py": "sbatch says it in the last line"},
    ),
    "Slurm's requeue policy": (
        lambda node: isinstance(node, ast.ImportFrom) and any(a.name == "EXIT_LOST_RANK" for a in node.names),
        {
            "launch/requeue.py": "",
            "distributed/heartbeat.py": "ends ranks with it",
            "distributed/orphans.py": "the same",
        },
    ),
}


@pytest.mark.parametrize("what", HELPERS)
def test_one_of_each_helper(what):
    recognised, allowed = HELPERS[what]
    assert {path for path, tree in modules().items() if any(map(recognised, ast.walk(tree)))} == allowed.keys()


def test_tests_choose_ports_in_one_place():
    found = {
        path for path, tree in modules("tests").items() if any(_called(node) == ".bind" for node in ast.walk(tree))
    }
    assert found == {"support/environment.py"}


# DeepSpeed


def test_one_file_knows_the_inside_of_deepspeed():
    """Only it imports DeepSpeed, and what it takes beyond the public interface names the versions it was seen in."""
    compat = "training/engine/deepspeed_compat.py"
    assert {str(path.relative_to(PACKAGE)) for _, path, name in imports() if name.split(".")[0] == "deepspeed"} == {
        compat
    }
    engine = modules()["training/engine/deepspeed.py"]
    private = [node.attr for node in ast.walk(engine) if isinstance(node, ast.Attribute) and node.attr.startswith("_")]
    assert set(private) == {"_clip_plain"}, "the engine's own"
    text = (PACKAGE / compat).read_text()
    tested = re.search(r'^TESTED = "(\S+) to (\S+)"$', text, re.MULTILINE)
    pinned = re.search(r"^deepspeed==(\S+)$", (REPO / "constraints.txt").read_text(), re.MULTILINE)
    assert tested[2] == pinned[1]
    for node in modules()[compat].body:
        if isinstance(node, ast.FunctionDef):
            lines = text.splitlines()[node.lineno - 1 : node.end_lineno]
            assert re.search(r"\b0\.\d+\.\d+ to 0\.\d+\.\d+", "\n".join(lines)), node.name
