"""The documents: their commands parse, their links lead somewhere, and what they name exists."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from cpsp_dist import cli, train
from cpsp_dist.config import flat, load_config
from tests.support.environment import REPO

PACKAGE = REPO / "cpsp_dist"
DOCS = REPO / "docs"
#: Words with a meaning that only this project's authors knew; CONTRIBUTING.md has those to use instead.
PRIVATE_WORDS = (
    r"(?i)(?<![a-z])(told|tells|mended|hears|witness|nursery|linger(s|ing)?|goes on|in vain|whole(?! number))(?![a-z])"
)


def documents() -> list[Path]:
    """Every Markdown file of the repository, also one that is not committed yet."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    listed = subprocess.run(command, cwd=REPO, check=True, capture_output=True, text=True, timeout=60)
    return sorted({REPO / name for name in listed.stdout.splitlines() if (REPO / name).is_file()})


def name_of(path: Path) -> str:
    return str(path.relative_to(REPO))


def code_lines(path: Path) -> list[str]:
    """The lines of a document's code blocks, continued lines joined."""
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return "\n".join(blocks).replace("\\\n", " ").splitlines()


def prose(path: Path) -> str:
    """A document without its code blocks."""
    return re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def inline_code(path: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(path))


def commands_in_docs() -> Iterator[tuple[Path, str, list[str]]]:
    """(file, program, arguments) of each command of ours in the code blocks of the documents."""
    for path in documents():
        for line in code_lines(path):
            found = re.match(r"(?:\S+=\S+ )*(?:[^#]*-m )?(cpsp-dist|cpsp_dist\.train|cpsp_dist) (.*)", line.strip())
            if found:
                yield path, found[1], shlex.split(found[2], comments=True)


def test_every_command_in_the_documents_parses(monkeypatch):
    """By the real parsers, without doing it."""
    for module in ("cpsp_dist.cli", "cpsp_dist.train"):
        monkeypatch.setattr(f"{module}.run_command", lambda run, **_: 0)
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")  # which train.main sets
    commands = list(commands_in_docs())
    for path, program, arguments in commands:
        try:
            (train.main if program == "cpsp_dist.train" else cli.main)(arguments)
        except SystemExit as error:
            pytest.fail(f"{name_of(path)}: {program} {shlex.join(arguments)}: exit code {error.code}")
    readme = [(program, *arguments[:1]) for path, program, arguments in commands if path == REPO / "README.md"]
    found = {("cpsp-dist", name) for name in ("shards", "evaluate", "compare", "launch")} | {("cpsp_dist", "doctor")}
    assert found | {("cpsp_dist.train", "--config")} <= {*readme}, "commands are found where they are"
    assert {path.parent for path, *_ in commands} >= {REPO, DOCS}


def test_commands_named_in_the_text_exist(capsys):
    for path in documents():
        for text in inline_code(path):
            if found := re.match(r"cpsp-dist ([a-z-]+)", text):
                with pytest.raises(SystemExit) as ended:
                    cli.main([found[1], "--help"])
                assert ended.value.code == 0, f"{name_of(path)}: {text}"


def test_make_targets_and_scripts_in_the_documents_exist():
    targets = re.findall(r"^([a-z-]+):", (REPO / "Makefile").read_text(), re.MULTILINE)
    for path in documents():
        for line in [*code_lines(path), *inline_code(path)]:
            if found := re.match(r"make ([a-z-]+)", line.strip()):
                assert found[1] in targets, f"{name_of(path)}: {line}"
            if found := re.search(r"\bsbatch .*?(slurm/\S+\.sh)", line):
                assert (REPO / found[1]).is_file(), f"{name_of(path)}: {line}"
            if found := re.search(r"python -m (tests\.\S+)", line):
                assert (REPO / f"{found[1].replace('.', '/')}.py").is_file(), f"{name_of(path)}: {line}"


def anchors(path: Path) -> set[str]:
    """Of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_relative_links_and_anchors_lead_somewhere():
    wrong, checked = [], 0
    for path in documents():
        for link in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
            if re.match(r"[a-z]+:", link):
                continue
            checked += 1
            target, _, anchor = link.partition("#")
            goal = (path.parent / target).resolve() if target else path
            if not goal.exists() or not goal.is_relative_to(REPO):
                wrong.append(f"{name_of(path)}: {link}")
            elif anchor and anchor not in anchors(goal):
                wrong.append(f"{name_of(path)}: {link}: no such heading")
    assert not wrong
    assert checked > 40


def test_pages_of_the_site_link_only_within_it():
    """A site generator takes `docs` alone."""
    for path in DOCS.glob("*.md"):
        assert "](../" not in prose(path), name_of(path)


def test_every_page_is_in_the_index():
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    assert not [page.name for page in DOCS.glob("*.md") if page.name != "README.md" and f"]({page.name}" not in index]


def test_paths_in_the_documents_exist():
    """Those of the repository that are in code font, such as `cpsp_dist/train.py`, or a module without `.py`."""
    wrong = []
    for path in documents():
        if path.name == "CHANGELOG.md":  # it also names what there was
            continue
        for text in inline_code(path):
            if re.fullmatch(r"(cpsp_dist|tests|docs|configs|slurm|shards)/[\w./-]+", text) and "NAME" not in text:
                there = REPO / text
                if not there.exists() and not there.with_suffix(".py").exists():
                    wrong.append(f"{name_of(path)}: {text}")
    assert not wrong


def test_settings_in_the_documents_exist():
    keys = flat(load_config(REPO / "configs" / "ave_full.yaml"))
    sections = {key.partition(".")[0] for key in keys if "." in key}
    wrong = []
    for path in documents():
        if path.name == "CHANGELOG.md":
            continue
        for text in [*inline_code(path), *code_lines(path)]:
            for key in re.findall(rf"(?<![\w./-])(?:{'|'.join(sections)})\.[a-z]\w*(?![\w(])", text):
                if key not in keys and not key.endswith((".py", ".md", ".yaml")):
                    wrong.append(f"{name_of(path)}: {key}")
    assert not wrong


def literals() -> str:
    """All string literals of the package; `…` stands for what an f-string fills in."""
    texts = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (v.value if isinstance(v, ast.Constant) else "…" for v in node.values)
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def test_messages_in_troubleshooting_are_printed_by_the_program():
    """The first cells of tables of messages: each part between two `…` is in some literal of the code."""
    printed = literals()
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `([^`]*…[^`]*)` \|", text, re.MULTILINE)
    # The console's handler prints the level in front.
    texts = {message: re.sub(r"^(warning|error): ", "", message) for message in messages}
    missing = [m for m, text in texts.items() if any(part.strip(" ;:,") not in printed for part in text.split("…"))]
    assert not missing
    assert len(messages) > 30


def test_exit_codes_are_explained():
    from cpsp_dist.utils import errors

    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    for name in dir(errors):
        if name.startswith("EXIT_"):
            assert re.search(rf"^\| {getattr(errors, name)} \|", text, re.MULTILINE), name


def test_the_package_map_names_every_folder_and_module():
    text = (DOCS / "architecture.md").read_text(encoding="utf-8").partition("## Package map")[2]
    names = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    named = {name.removesuffix(".py") for name in re.findall(r"`([\w.]+)`", text)}
    assert not sorted(name for name in names if not name.startswith("__") and name not in named)


def test_documents_use_plain_words():
    for path in documents():
        if found := re.search(PRIVATE_WORDS, re.sub(r"`[^`]*`", "", prose(path))):
            assert path.name == "CONTRIBUTING.md", f"{name_of(path)}: '{found[0]}'"


def test_code_is_in_plain_words():
    """Names too: an underscore separates words. Not this file, which lists the words, and not an option of sockets."""
    sources = [path for folder in (PACKAGE, REPO / "tests") for path in folder.rglob("*.py") if path != Path(__file__)]
    for path in [*sources, *(REPO / "slurm").glob("*.sh"), *(REPO / "configs").rglob("*.yaml")]:
        found = re.search(PRIVATE_WORDS, path.read_text(encoding="utf-8").replace("SO_LINGER", ""))
        assert not found, f"{name_of(path)}: '{found[0]}'"


def test_readme_is_short():
    assert len((REPO / "README.md").read_text(encoding="utf-8").splitlines()) <= 130


def test_citation_is_complete():
    citation = yaml.safe_load((REPO / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "version", "license", "preferred-citation"} <= set(citation)
    assert [author["family-names"] for author in citation["preferred-citation"]["authors"]] == ["Zhou", "Guo", "Wang"]


def test_the_workflow_runs_make_test():
    workflow = yaml.safe_load((REPO / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8"))
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert "make test" in [step.get("run") for step in steps]
