"""torchrun and accelerate as they are, but that ranks are forked from a process that has imported everything.

Their own code reads the arguments and files, meets, and sets the environment; only the start of a Python for each rank
is left out, which takes most of such a launch's CPU time.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from tests.support.environment import LAUNCHER


def main(arguments: Sequence[str]) -> int:
    """`-m LAUNCHER ARGUMENTS ... -m cpsp_dist.train ...`, in a child of the prefork."""
    import torch.distributed.run as torchrun

    for name in [name for name in os.environ if name.startswith(LAUNCHER)]:
        del os.environ[name]
    read = torchrun.config_from_args

    def config_from_args(args: Any) -> Any:
        config, program, rest = read(args)
        assert program == sys.executable
        at = rest.index("cpsp_dist.train")
        assert rest[at - 1] == "-m"
        config.start_method = "fork"
        return config, rank, rest[at + 1 :]

    torchrun.config_from_args = config_from_args
    module, *given = arguments[1:]
    if module == torchrun.__name__:
        torchrun.main(given)
    else:
        from accelerate.commands import launch

        assert module == launch.__name__
        launch.launch_command(launch.launch_command_parser().parse_args(given))
    return 0


def rank(*arguments: str) -> None:
    from cpsp_dist import train

    if code := train.main(arguments):
        sys.exit(code)
