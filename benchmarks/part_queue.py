"""Long work in parts: each is done once, its result kept as JSON; what was killed goes on with the rest."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cli import ROOT
from image_io import write_text

TAIL = 12  # lines of a failed command that are shown
Results = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """A piece of work.

    work: gets the results of all parts that are done; what it returns can be written as JSON. needs: names of the parts
    that must be done before.
    """

    name: str
    work: Callable[[Results], Any]
    needs: tuple[str, ...] = ()


def run_parts(
    parts: Sequence[Part],
    folder: Path,
    *,
    jobs: int,
    report: Callable[[str], None],
    stop: Callable[[], None] = lambda: None,
) -> Results:
    """Do all parts that have no result in `folder` yet, `jobs` at a time, each as early as it can be, in their order.

    Returns:
        Results by the names of the parts.

    Raises:
        ValueError: a part needs one that does not exist, or parts need each other.
        Exception: of the first part that fails, after `stop` was called, which ends those that run.
    """
    results: Results = {}
    left = []
    for part in parts:
        path = folder / f"{part.name}.json"
        if path.is_file():
            results[part.name] = json.loads(path.read_text(encoding="utf-8"))
        else:
            left.append(part)
    with ThreadPoolExecutor(jobs) as pool:
        try:
            _run_all(left, results, pool, jobs, lambda name: _keep(name, results, folder, len(parts), report))
        except BaseException:
            stop()
            raise
    return results


def _run_all(
    left: list[Part], results: Results, pool: ThreadPoolExecutor, jobs: int, keep: Callable[[str], None]
) -> None:
    running: dict[Future[Any], str] = {}
    while left or running:
        ready = [part for part in left if all(name in results for name in part.needs)][: jobs - len(running)]
        if not ready and not running:
            raise ValueError(f"{left[0].name} needs {', '.join(left[0].needs)}, which never come")
        for part in ready:
            left.remove(part)
            running[pool.submit(part.work, dict(results))] = part.name
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            name = running.pop(future)
            results[name] = future.result()
            keep(name)


def _keep(name: str, results: Results, folder: Path, total: int, report: Callable[[str], None]) -> None:
    write_text(folder / f"{name}.json", json.dumps(results[name], indent=1) + "\n")
    report(f"{name}: done ({len(results)} of {total})")


@dataclass
class Commands:
    """Runs commands of the repository, each in a process with so many threads."""

    threads: int
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, words: Sequence[str], log: Path) -> None:
        """Run `python WORDS` to its end; its output goes to a file.

        Raises:
            RuntimeError: it failed; with the last lines that it wrote.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        count = str(self.threads)
        env = {**os.environ, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "OPENCV_FOR_THREADS_NUM": count}
        with log.open("wb") as file:
            with self.lock:
                process = subprocess.Popen([sys.executable, *words], cwd=ROOT, env=env, stdout=file, stderr=file)
                self.running.append(process)
            status = process.wait()
            self.running.remove(process)
        if status:
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:]
            raise RuntimeError("\n".join([f"python {' '.join(words)} ended with status {status}; see {log}", *lines]))

    def stop(self) -> None:
        """End what still runs; it goes on with the next start."""
        for process in list(self.running):
            process.terminate()
