"""Training in several processes that torchrun started: who does what, what is summed over all, what if one ends.

Every process learns the same weights. It takes its share of each batch and of the images to score; sums (never ratios)
are added over all processes, so everything that is decided from them is the same in all. The first process alone
checks the data, writes and prints.
"""

import os
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gathering import sum_over

Result = TypeVar("Result")

STEP_LIMIT = timedelta(minutes=20)  # for the sums of a step; a process that hangs for longer ends all
PATIENCE = timedelta(days=14)  # for what one process does alone, such as checking the data; one that dies is noticed
NOTICED = 3.0  # seconds in which the system tells that a process has ended
ERROR_KEY, TOLD_KEY = "tessera/error", "tessera/told"
AGAIN = "the same command goes on from the last finished epoch"


class ProcessLost(RuntimeError):
    """Another process of the run has ended, so this one cannot go on."""


class SumLoss(Protocol):
    """A loss that is a function of sums over pixels, as losses.Loss is."""

    def sums(self, logits: Tensor, mask: Tensor) -> Tensor:
        """What from_sums needs, (S,)."""

    def from_sums(self, sums: Tensor) -> Tensor:
        """The loss from sums that were added, a scalar."""


class Processes:
    """One process on its own; see Several for what the methods do when there are more.

    rank: number of this process, 0 to world - 1. on_machine: how many there are on this machine.
    """

    rank, world, on_machine = 0, 1, 1
    described = ""

    @property
    def first(self) -> bool:
        """Whether this is the process that checks, writes and prints."""
        return self.rank == 0

    def workers(self, wanted: int) -> int:
        """Loader processes of this process out of `wanted` on the machine, at least one if any are wanted."""
        return -(-wanted // self.on_machine)

    def device(self, name: str) -> str:
        """The device of this process out of what --device chose."""
        return name

    def first_does(self, work: Callable[[], Result]) -> Result:
        """Result of what the first process does while the others wait for it."""
        return work()

    def first_then_others(self, work: Callable[[], Result]) -> Result:
        """Result of what each process does, the first before the others, which find the files that it downloaded."""
        return work()

    def shared_loss(self, loss: Any) -> Any:
        """The loss of the batches of all processes together."""
        return loss

    def add(self, values: Tensor) -> None:
        """Add a tensor over the processes, in place."""

    def gather(self, value: Result) -> list[Result]:
        """What every process has, in order."""
        return [value]

    def same_buffers(self, network: nn.Module) -> None:
        """Give every process the buffers of the first, such as the running statistics of batch normalisation."""

    def start_epoch(self, seed: int, epoch: int) -> None:
        """Choose what dropout draws in this epoch."""


ALONE = Processes()


class Several(Processes):
    """This process among several that torchrun started.

    Args:
        kind: "cuda" or "cpu".
    """

    def __init__(self, kind: str) -> None:
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.on_machine = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if kind == "cuda" and self.local_rank < torch.cuda.device_count():
            torch.cuda.set_device(self.local_rank)
        self.store, self.rank, self.world = next(dist.rendezvous("env://"))
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        dist.init_process_group(backend, store=self.store, rank=self.rank, world_size=self.world, timeout=STEP_LIMIT)
        self.patient: Any = dist.new_group(backend="gloo", timeout=PATIENCE)
        self.host = socket.gethostname()
        self.peers = self.gather((self.host, os.getpid()))
        threads = "" if kind == "cuda" else f" with {torch.get_num_threads()} threads each (OMP_NUM_THREADS)"
        self.described = f", {self.world} processes{threads}"

    def device(self, name: str) -> str:
        """The GPU of this process, or the cpu."""
        return f"cuda:{self.local_rank}" if name == "cuda" else name

    def first_does(self, work: Callable[[], Result]) -> Result:
        """Result of what the first process does while the others wait; they end quietly when it fails."""
        result: list[Any] = [None, False]
        try:
            if self.first:
                result = [work(), True]
        finally:
            dist.broadcast_object_list(result, src=0, group=self.patient)
        if not result[1]:
            sys.exit(0)  # the first process says what is wrong, and its status counts
        return result[0]

    def first_then_others(self, work: Callable[[], Result]) -> Result:
        """Result of what each process does, the first before the others."""
        if not self.first:
            self.gather(None)
            return work()
        try:
            return work()
        finally:
            self.gather(None)

    def shared_loss(self, loss: SumLoss) -> Callable[[Tensor, Tensor], Tensor]:
        """The loss of the batches of all processes together, from their added sums.

        Its gradient is such that the mean over processes, which DDP takes, is the gradient of that loss.
        """

        def together(logits: Tensor, mask: Tensor) -> Tensor:
            return loss.from_sums(sum_over(loss.sums(logits, mask)))

        return together

    def add(self, values: Tensor) -> None:
        """Add a tensor over the processes, in place."""
        dist.all_reduce(values)

    def gather(self, value: Result) -> list[Result]:
        """What every process has, in order. Everything that can be pickled; for small things."""
        gathered: list[Any] = [None] * self.world
        dist.all_gather_object(gathered, value, group=self.patient)
        return gathered

    def same_buffers(self, network: nn.Module) -> None:
        """Give every process the buffers of the first, which has samples in every batch."""
        for buffer in network.buffers():
            dist.broadcast(buffer, src=0)

    def start_epoch(self, seed: int, epoch: int) -> None:
        """Let dropout of the other processes draw its own numbers; the first goes on with those of a run of one."""
        if not self.first:
            torch.manual_seed((seed * 1_000_003 + epoch) * 1_009 + self.rank)

    # -------------------------------------------------------------- when something ends

    def lost(self) -> list[int]:
        """Numbers of the processes on this machine that have ended."""
        import psutil

        ended = []
        for rank, (host, number) in enumerate(self.peers):
            if host == self.host and number != os.getpid():
                try:
                    if psutil.Process(number).status() == psutil.STATUS_ZOMBIE:
                        ended.append(rank)
                except psutil.NoSuchProcess:
                    ended.append(rank)
        return ended

    def explain(self, error: BaseException) -> BaseException | None:
        """What this process should say about an error; None when another has said it.

        A process that ends breaks the sums of all others, whose own errors then only say that a connection is closed.
        """
        if isinstance(error, KeyboardInterrupt):
            return error if self.first else None
        if type(error) is RuntimeError or isinstance(error, dist.DistError | _Terminated):
            begin, ended = time.monotonic(), self.lost()
            while not ended and self._said() is None and time.monotonic() - begin < NOTICED:
                time.sleep(0.05)
                ended = self.lost()
            if ended:
                names = " and ".join(f"{rank} (pid {self.peers[rank][1]})" for rank in ended)
                error = ProcessLost(
                    f"process{'es' if len(ended) > 1 else ''} {names} of {self.world} ended without a word: killed, or "
                    f"the machine ran out of memory. The others end too; {AGAIN}"
                )
        mine = self._say_first(error)
        if self.first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            self._keep_store()
        return error if mine else None

    def _keep_store(self) -> None:
        """Wait for the others, who would not know without the store, which ends with this process, what was said."""
        begin = time.monotonic()
        while time.monotonic() - begin < NOTICED:
            if self.store.add(TOLD_KEY, 0) + len(self.lost()) >= self.world:
                return
            time.sleep(0.05)

    def _said(self) -> str | None:
        """The rank of the process that has said why the run ends, and its words."""
        try:
            return self.store.get(ERROR_KEY).decode() if self.store.check([ERROR_KEY]) else None
        except RuntimeError:  # the store ended with the process that kept it
            return None

    def _say_first(self, error: BaseException) -> bool:
        """Whether no other process has said why the run ends; an error of one's own is said too."""
        try:
            said = self.store.compare_set(ERROR_KEY, "", f"{self.rank} {error}").decode()
            self.store.add(TOLD_KEY, 1)
        except RuntimeError:
            return True
        rank, _, words = said.partition(" ")
        consequence = type(error) is RuntimeError or isinstance(error, dist.DistError | ProcessLost | _Terminated)
        return int(rank) == self.rank or not (consequence or words == str(error))


class _Terminated(RuntimeError):
    """The process was told to end."""


def _end_on_sigterm() -> None:
    """Raise an error on SIGTERM, which torchrun sends to the others when a process has ended."""
    owner = os.getpid()

    def handle(*_: Any) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if os.getpid() != owner:  # of a loader process
            os._exit(0)
        raise _Terminated(f"told to end by SIGTERM; {AGAIN}")

    signal.signal(signal.SIGTERM, handle)


@contextmanager
def join_processes(kind: str) -> Iterator[Processes]:
    """The processes that torchrun started, or this one on its own when it was started without.

    Within it only the first process prints. An error is raised in one of them, those that only follow from it end
    with status 1.

    Args:
        kind: "cuda" or "cpu".
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    several = Several(kind)
    _end_on_sigterm()
    warnings.filterwarnings(
        "ignore", message="`broadcast_buffers` is deprecated"
    )  # older versions of PyTorch don't have the new name
    with Path(os.devnull).open("w") as nothing, redirect_stdout(sys.stdout if several.first else nothing):
        try:
            yield several
            several.gather(None)  # to one that still writes, another that has ended would look killed
        except (Exception, KeyboardInterrupt) as error:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's: we are ending
            shown = several.explain(error)
            if shown is None:
                sys.exit(1)
            if shown is error:
                raise
            raise shown from error
    dist.destroy_process_group()
