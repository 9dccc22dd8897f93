"""Scripts for shells: bash runs what is printed and completes with it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from cpsp_dist.cli import main

#: Calls the function of the script as bash does for the words in $@, of which the last one is to be completed.
COMPLETE = """
source "$1"; shift
function=$(complete -p cpsp-dist | sed 's/.*-F \\([^ ]*\\).*/\\1/')
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
"$function" cpsp-dist "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("cpsp-dist sh", {"shards"}),
        ("cpsp-dist shards ", {"pack", "index", "merge", "subset", "split", "verify", "info", "preview", "plan"}),
        ("cpsp-dist shards pack --layout ave", {"ave-h5", "ave-pickles"}),
        ("cpsp-dist train --all", {"--allow-config-change"}),
        ("cpsp-dist completion ", {"bash", "zsh", "tcsh"}),
    ],
)
def test_bash_completes(words: str, completed: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "completion"
    script.write_text(capsys.readouterr().out)
    command = ["bash", "--norc", "-c", COMPLETE, "bash", str(script), *words.split(" ")]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
    assert {*done.stdout.split()} >= completed
    assert done.stderr == ""


@pytest.mark.parametrize(("shell", "head"), [("zsh", "#compdef cpsp-dist"), ("tcsh", "# AUTOMATICALLY GENERATED")])
def test_other_shells_get_a_script(shell: str, head: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    assert capsys.readouterr().out.startswith(head)
