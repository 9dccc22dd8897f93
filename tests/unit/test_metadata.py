"""pyproject.toml against the code: what is imported is required, and each Python that is allowed was tried."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from cpsp_dist import __version__
from cpsp_dist.doctor.machine import TESTED_PYTHON
from tests.support.environment import REPO

PYPROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
#: Runs in environments of its own, one for each other library.
OWN_ENVIRONMENT = REPO / "cpsp_dist/bench/peer.py"


def names(requirements: list[str]) -> set[str]:
    return {re.sub(r"[-_.]+", "-", Requirement(text).name).lower() for text in requirements}


REQUIRED = names(PROJECT["dependencies"])
EXTRAS = {extra: names(texts) for extra, texts in PROJECT["optional-dependencies"].items() if extra != "dev"}


def imported(path: Path, at_top: bool) -> Iterator[str]:
    """Libraries that a module imports: at its top level, or anywhere."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if at_top else ast.walk(tree):
        found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            found = [node.module or ""]
        yield from {text.partition(".")[0] for text in found} - sys.stdlib_module_names - {"cpsp_dist"}


def test_what_is_imported_is_required():
    providers = packages_distributions()
    allowed = REQUIRED.union(*EXTRAS.values())
    used = set()
    for path in (REPO / "cpsp_dist").rglob("*.py"):
        if path == OWN_ENVIRONMENT:
            continue
        for at_top, among in ((True, REQUIRED), (False, allowed)):
            for name in imported(path, at_top):
                brings = {re.sub(r"[-_.]+", "-", provider).lower() for provider in providers[name]}
                assert brings & among, f"{path.relative_to(REPO)} imports {name}, which nothing required brings"
                used |= brings & among
    # The launcher; fsspec's and mlflow's; the format's own library, which `bench peers` runs elsewhere.
    unused = {"accelerate", "aiohttp", "alembic", "sqlalchemy", "webdataset"}
    assert REQUIRED - used == unused


def test_libraries_with_private_names_have_an_upper_bound():
    bounded = {Requirement(text).name for text in PROJECT["dependencies"] if "<" in text}
    assert {"deepspeed", "submitit"} <= bounded


def test_the_allowed_python_is_the_tried_one():
    tried = ".".join(map(str, TESTED_PYTHON))
    allowed = SpecifierSet(PROJECT["requires-python"])
    assert [minor for minor in range(5, 30) if f"3.{minor}.1" in allowed] == [TESTED_PYTHON[1]]
    classified = [text for text in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", text)]
    assert classified == [f"Programming Language :: Python :: {tried}"]
    assert PYPROJECT["tool"]["mypy"]["python_version"] == tried
    assert PYPROJECT["tool"]["ruff"]["target-version"] == f"py{tried.replace('.', '')}"
    assert f"!= {TESTED_PYTHON}" in (REPO / "Makefile").read_text()
    assert f"Python {tried}" in (REPO / "README.md").read_text()


def test_the_tested_versions_are_allowed():
    lines = [line for line in (REPO / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    tested = {name: Requirement(line).specifier for line in lines for name in names([line])}
    texts = [*PROJECT["dependencies"], *(t for texts in PROJECT["optional-dependencies"].values() for t in texts)]
    for text in texts:
        for name in names([text]) & tested.keys():
            (version,) = tested[name]
            assert Requirement(text).specifier.contains(version.version), text


def test_the_version_has_one_place():
    assert PROJECT["dynamic"] == ["version"]
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "cpsp_dist.__version__"}
    assert __version__ not in (REPO / "pyproject.toml").read_text()
