"""The one place that decides which process prints an error, and with which exit code a command ends."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from cpsp_dist.utils import streams
from cpsp_dist.utils.errors import (
    EXIT_REQUEUE,
    EXIT_UNEXPECTED,
    EXIT_USER_ERROR,
    DataError,
    DeviceLost,
    LostRank,
    RankError,
    Stopped,
    UserError,
    of_file,
)
from cpsp_dist.utils.files import write_text
from cpsp_dist.utils.logs import console, printable
from cpsp_dist.utils.redact import without_secrets
from cpsp_dist.utils.text import one_line

logger = logging.getLogger(__name__)


#: What launchers call a rank's number on its machine.
LOCAL_RANKS = (
    "LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "MV2_COMM_WORLD_LOCAL_RANK",
    "MPI_LOCALRANKID",
    "SLURM_LOCALID",
)
#: And how many ranks they started.
WORLD_SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_NTASKS")
#: That number, once it is known: LOCAL_RANK is the number of the rank's GPU then.
_local_rank: int | None = None


def set_local_rank(number: int) -> None:
    global _local_rank
    _local_rank = number


def should_print(error: BaseException, env: Mapping[str, str] | None = None) -> bool:
    """Whether it is for this process, of all ranks that meet `error`, to print it.

    What every rank meets is printed once per machine (local rank 0, which before the ranks are connected only the
    launcher's own variables name; they may be left over from another command). What one rank alone may have met is
    printed by that rank. A lost rank is reported once per machine, and in any case by the lowest rank that is left.
    """
    known = _local_rank if env is None else None
    alone = env is None and known is None and not _has_siblings()
    env = os.environ if env is None else env
    alone |= all((env.get(name) or "1") in ("0", "1") for name in WORLD_SIZES)  # whatever its local rank is said to be
    local = str(known) if known is not None else next(filter(None, map(env.get, LOCAL_RANKS)), "0")
    local_first = alone or local == "0"
    rank, world = (int(text) if (text := env.get(name) or "").isdecimal() else 0 for name in ("RANK", "WORLD_SIZE"))
    match error:
        case RankError() | DeviceLost():
            return True
        case UserError() if error.claimed_by is not None:
            return error.claimed_by == rank
        case DataError():
            return True
        case LostRank():
            return local_first or rank == min({*range(max(world, 1))} - {*error.ranks}, default=0)
    return local_first


def _has_siblings() -> bool:
    """Whether a launcher runs, or ran, other processes like this one here; True where the system does not show that."""
    if {"SLURM_STEP_ID", "TORCHELASTIC_RUN_ID"} & {*os.environ}:
        return True
    try:
        children = Path(f"/proc/{os.getppid()}/task/{os.getppid()}/children").read_text().split()
    except OSError:
        return True
    own = _arguments(os.getpid())
    return sum(_arguments(int(pid)) in (own, b"") for pid in children) > 1  # an ended one has none


def _arguments(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def report(error: BaseException) -> None:
    """Print it as one line, where this process is to print it; with debug, its traceback too."""
    _leave_for_agent(str(error))
    if should_print(error):
        level, prefix = (logging.WARNING, "") if isinstance(error, Stopped) else (logging.ERROR, "error: ")
        logger.log(level, "%s", error, exc_info=error, extra={"prefix": prefix})


def _leave_for_agent(text: str) -> None:
    """The agent of torchrun and accelerate ends with a traceback of its own, whatever the ranks do; the last lines of
    that are what a rank left in the file that the agent named to it. Form: torch.distributed.elastic's ErrorHandler."""
    path = Path(os.environ.get("TORCHELASTIC_ERROR_FILE") or "/")
    line = printable(without_secrets(text))[:1000]
    message = {"message": line, "extraInfo": {"py_callstack": line, "timestamp": str(int(time.time()))}}
    with contextlib.suppress(OSError, ValueError):
        if not path.exists():
            write_text(path, json.dumps({"message": message}))


def _report_unexpected(error: BaseException, doing: str) -> None:
    text = unexpected(error, doing)
    _leave_for_agent(text)
    logger.error("%s", text, exc_info=error, extra={"prefix": "error: "})


def unexpected(error: BaseException, doing: str) -> str:
    """One line for an exception that nothing else has explained: what was being done, what it is, where it comes from.

    Each rank that meets one prints it: others may not meet the same.
    """
    text = one_line(error)[:300]
    name = "out of memory" if isinstance(error, MemoryError) else f"unexpected {type(error).__name__}"
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "cpsp_dist" in Path(frame.filename).parts]
    place = ""
    if ours:
        parts = Path(ours[-1].filename).parts
        file = "/".join(parts[len(parts) - 1 - parts[::-1].index("cpsp_dist") :])
        place = f" ({file}, line {ours[-1].lineno})"
    where = [*getattr(error, "__notes__", ()), "--debug prints the traceback"][0]
    return f"{doing}: {name}{f': {text}' if text else ''}{place}; {where}"


@contextmanager
def _threads_in_one_line(doing: str) -> Iterator[None]:
    """An exception that ends a thread is printed like any other; the command continues."""

    def report_thread(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
            logger.error("%s", unexpected(args.exc_value, doing), exc_info=args.exc_value)

    before, threading.excepthook = threading.excepthook, report_thread
    try:
        yield
    finally:
        threading.excepthook = before


def _leave_failed_gpu(code: int) -> None:
    """End this process with `code` where it uses a GPU, without Python's own end: after an error of a GPU, or of a rank
    that is gone, the destructors of CUDA's and NCCL's objects abort the process, and the exit code would be theirs."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        streams.flush()
        logging.shutdown()
        os._exit(code)


def run_command(
    main: Callable[[], int | None], *, stdout: bool = False, debug: bool = False, doing: str = "cpsp-dist"
) -> int:
    """Run `main` with a console (see `logs.console`), and return the exit code.

    The exceptions of errors.py become one line on stderr and their code, Ctrl-C 130, a reader of the output that has
    ended 141, as in a shell, what is about a file 2, and all others EXIT_UNEXPECTED. `doing` is named for these.
    """
    streams.prepare()
    with console(stdout=stdout, debug=debug), _threads_in_one_line(doing):
        try:
            code = main() or 0
            if code:
                _leave_for_agent(f"{doing}: exit code {code}; its lines are above")
            if not stdout:  # a training that has ended well has; that its lines are lost was printed
                streams.flush()
            return code
        except UserError as error:
            report(error)
            return EXIT_USER_ERROR
        except LostRank as lost:
            report(lost)
            _leave_failed_gpu(lost.code)
            return lost.code
        except Stopped as stopped:
            report(stopped)
            return EXIT_REQUEUE
        except KeyboardInterrupt as interrupt:
            logger.warning("interrupted", exc_info=interrupt, extra={"prefix": ""})
            return 130
        except BrokenPipeError:  # `| head` has read enough
            return 128 + signal.SIGPIPE
        except OSError as error:
            if (mistake := of_file(error)) is None:
                _report_unexpected(error, doing)
                return EXIT_UNEXPECTED
            report(mistake)
            return EXIT_USER_ERROR
        except Exception as error:
            _report_unexpected(error, doing)
            if "CUDA error" in str(error):
                _leave_failed_gpu(EXIT_UNEXPECTED)
            return EXIT_UNEXPECTED
        finally:
            streams.drop_unwritten()
