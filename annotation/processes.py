"""Files worked on by several processes: one that is killed costs its file alone, and none outlives its parent."""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

import cli

DEATHS = 3  # of processes in a row: then the rest is left
KILLED = (
    "the process that worked on it was killed from outside or crashed, mostly for want of memory; expected it to end "
    "by itself: look at pictures in smaller windows with --max-megapixels, or use a computer with more memory"
)

_FAILURE: Exception | None = None  # of a process: why it could not be made ready


def run_processes(
    load: Callable[[], None], work: Callable[[Path], Any], paths: Sequence[Path], workers: int
) -> Generator[tuple[Path, Any], None, None]:
    """Each file with what `work` says about it, or a message (str), in order; one worker works in this process.

    When a process is killed, the rest is done by one process at a time, so that the file that kills it is known. What
    the others had done by then is asked for again.

    Args:
        load: called once in each process, before the first file.
        work: called with each file. Both must be known by name, for processes start afresh.

    Raises:
        Exception: what `load` raised, in other processes as RuntimeError or cli.UsageError.
    """
    workers, waiting, killed = min(workers, len(paths)), list(paths), 0
    if waiting and workers < 2:
        load()
        yield from ((path, work(path)) for path in waiting)
        return
    while waiting and killed < DEATHS:
        try:
            for result in _run_pool(load, work, waiting, workers):
                yield waiting.pop(0), result
                killed = 0
        except BrokenProcessPool:
            if workers > 1:
                sys.stderr.write("a process was killed; the rest is done by one at a time\n")
                workers = 1
                continue
            killed += 1
            path = waiting.pop(0)
            yield path, f"{path}: {KILLED}"
    yield from ((path, f"{path}: not done, for {DEATHS} processes in a row were killed") for path in waiting)


def keep_memory() -> None:
    """Let this process keep memory that it frees, where the C library can.

    Large arrays otherwise go back to the system and come back page by page, a quarter of the time of a large picture.
    """
    keep = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if keep is not None:
        keep(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        keep(-4, 0)  # M_MMAP_MAX


def _run_pool(
    load: Callable[[], None], work: Callable[[Path], Any], paths: Sequence[Path], workers: int
) -> Iterator[Any]:
    context = multiprocessing.get_context("spawn")  # a fork would carry the threads' locks along
    pool = ProcessPoolExecutor(workers, context, initializer=_start, initargs=(load,))
    try:
        yield from pool.map(partial(_work, work), paths)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start(load: Callable[[], None]) -> None:
    """Make a process ready; it ends with its parent, and at once after Ctrl-C."""
    global _FAILURE
    threading.Thread(target=_follow_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        load()
    except Exception as error:  # raised when the first file comes: from here it would only say that the pool broke
        kind = cli.UsageError if isinstance(error, cli.UsageError) else RuntimeError
        _FAILURE = kind(cli.plain_message(error) or type(error).__name__)


def _work(work: Callable[[Path], Any], path: Path) -> Any:
    if _FAILURE is not None:
        raise _FAILURE
    return work(path)


def _follow_parent() -> None:
    """End this process when its parent was killed: it would wait for files forever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
