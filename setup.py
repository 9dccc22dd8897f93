"""Puts configs, Slurm scripts and tested versions into the package; pyproject.toml has all metadata."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("configs", "slurm", "constraints.txt")


class BuildPy(build_py):
    """Copies SHIPPED to cpsp_dist/shipped. An editable install finds them where they are: see utils/shipped.py."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib, "cpsp_dist", "shipped")
        shutil.rmtree(target, ignore_errors=True)  # of an earlier build
        for path in (Path(name) for name in SHIPPED):
            files = [path] if path.is_file() else [p for p in path.rglob("[!.]*") if p.is_file() and p.suffix != ".md"]
            for file in files:
                self.mkpath(str((target / file).parent))
                self.copy_file(str(file), str(target / file))  # with its mode: scripts stay executable


setup(cmdclass={"build_py": BuildPy})
