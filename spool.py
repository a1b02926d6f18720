"""Append-only files on disk that survive a kill at any moment: encoded tiles with an index, a journal, a lock.

What the last whole line of the journal counts is safe: everything it names was synced to the disk before the line was
written. Whatever lies behind that in the files is cut off when the folder is opened again.
"""

import contextlib
import errno
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

FULL = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))
INDEX_ENTRY = np.dtype([("offset", "<u8"), ("length", "<u4"), ("crc", "<u4")])


class JobError(RuntimeError):
    """A working folder that is in use, damaged or not in the state that was asked of it."""


class DamagedTile(Exception):  # noqa: N818 - turned into a JobError by those who know where the tile lies
    """A tile whose bytes are not those that were written; `number` counts the tiles of the spool from 0."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Spool:
    """Encoded tiles one behind the other in STEM.tiles, and where each lies in STEM.index."""

    def __init__(self, folder: Path, stem: str) -> None:
        self.path = folder / f"{stem}.tiles"
        self.index_path = folder / f"{stem}.index"
        self.size = 0  # bytes of tiles
        self.count = 0  # tiles
        self._handles: tuple[IO[bytes], IO[bytes]] | None = None
        self._dirty = False

    def append(self, tiles: Sequence[bytes]) -> None:
        """Add encoded tiles; they are safe after sync and the journal's next line.

        Raises:
            OSError: the disk is full or the file cannot be written; names the file and the tile.
        """
        entries = np.zeros(len(tiles), INDEX_ENTRY)
        lengths = [len(tile) for tile in tiles]
        entries["offset"] = self.size + np.cumsum([0, *lengths[:-1]])
        entries["length"] = lengths
        entries["crc"] = [zlib.crc32(tile) for tile in tiles]
        self._dirty = True
        data, index = self._open()
        for number, tile in enumerate(tiles, self.count):
            with naming(self.path, f"encoded tile {number}"):
                write_all(data, tile)
        with naming(self.index_path, f"the index of tiles {self.count} to {self.count + len(tiles) - 1}"):
            write_all(index, entries.tobytes())
        self.size += sum(lengths)
        self.count += len(tiles)

    def sync(self) -> None:
        """Bring what was appended to the disk; does nothing when nothing was."""
        if self._dirty and self._handles is not None:
            for handle, path in zip(self._handles, (self.path, self.index_path), strict=True):
                with naming(path, "what the system had buffered"):
                    os.fsync(handle.fileno())
        self._dirty = False

    def read(self, start: int, stop: int) -> list[bytes]:
        """The encoded bytes of tiles start..stop-1.

        Raises:
            DamagedTile: bytes are missing, or a checksum differs.
        """
        entries = self._read_index(start, stop)
        tiles = []
        with self.path.open("rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            for number, (offset, length, crc) in enumerate(entries.tolist(), start):
                if offset + length > size:
                    raise DamagedTile(number)
                handle.seek(offset)
                tile = handle.read(length)
                if len(tile) != length or zlib.crc32(tile) != crc:
                    raise DamagedTile(number)
                tiles.append(tile)
        return tiles

    def _read_index(self, start: int, stop: int) -> np.ndarray:
        with self.index_path.open("rb") as handle:
            handle.seek(start * INDEX_ENTRY.itemsize)
            data = handle.read((stop - start) * INDEX_ENTRY.itemsize)
        whole = len(data) // INDEX_ENTRY.itemsize
        if whole < stop - start:
            raise DamagedTile(start + whole)
        return np.frombuffer(data, INDEX_ENTRY)

    def holds(self, size: int, count: int, checked: int) -> bool:
        """Whether there are `count` tiles in `size` bytes and the last `checked` of them are undamaged."""
        try:
            self.read(max(count - checked, 0), count)
            ends = [int(entry["offset"]) + int(entry["length"]) for entry in self._read_index(max(count - 1, 0), count)]
        except (OSError, DamagedTile):
            return False
        return (ends or [0]) == [size]

    def cut(self, size: int, count: int) -> None:
        """Drop everything behind `count` tiles of `size` bytes in all; makes the files when they are absent."""
        self.close()
        for path, length in ((self.path, size), (self.index_path, count * INDEX_ENTRY.itemsize)):
            with naming(path, "nothing yet: it was being cut back"), path.open("ab") as handle:
                handle.truncate(length)
                os.fsync(handle.fileno())
        self.size, self.count = size, count

    def _open(self) -> tuple[IO[bytes], IO[bytes]]:
        if self._handles is None:
            self._handles = self.path.open("ab", buffering=0), self.index_path.open("ab", buffering=0)
        return self._handles

    def close(self) -> None:
        """Close the files; a later append opens them again."""
        for handle in self._handles or ():
            handle.close()
        self._handles = None

    def remove(self) -> None:
        """Close and delete both files."""
        self.close()
        self.path.unlink(missing_ok=True)
        self.index_path.unlink(missing_ok=True)


class Journal:
    """Lines of JSON, each behind its checksum. A line that is not whole, and all after it, do not count."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self) -> list[tuple[int, Any]]:
        """The whole lines: (byte at which the line ends, content) each; empty when there is no journal."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return []
        lines, end = [], 0
        for line in data.splitlines(keepends=True):
            crc, _, text = line.partition(b" ")
            if not text.endswith(b"\n") or crc != b"%08x" % zlib.crc32(text):
                break
            end += len(line)
            lines.append((end, json.loads(text)))
        return lines

    def append(self, content: Any) -> None:
        """Add a line and wait until the disk has it."""
        text = json.dumps(content, ensure_ascii=True).encode() + b"\n"
        with naming(self.path, "the line that makes the last rows count"), self.path.open("ab", buffering=0) as handle:
            write_all(handle, b"%08x " % zlib.crc32(text) + text)
            os.fsync(handle.fileno())

    def cut(self, end: int) -> None:
        """Drop everything behind a byte."""
        with self.path.open("ab") as handle:
            handle.truncate(end)
            os.fsync(handle.fileno())


class FolderLock:
    """An exclusive lock on a folder that the system gives up when its owner ends, however it ends."""

    def __init__(self, folder: Path) -> None:
        """Take the lock.

        Raises:
            JobError: another process holds it.
        """
        self.folder, self.path = folder, folder / "lock"
        while True:
            handle = self.path.open("a+b", buffering=0)
            try:
                _lock(handle)
            except OSError as error:
                owner = _owner(handle)
                handle.close()
                if error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
                    raise OSError(
                        error.errno,
                        f"cannot be locked ({error.strerror}); use an output folder on another disk",
                        str(folder),
                    ) from error
                raise JobError(
                    f"{folder} is in use by another process{owner}; expected one process for each image: wait until "
                    "it ends, or write to another output folder"
                ) from error
            if self._is_current(handle):
                break
            handle.close()  # the owner before us removed the file after we had opened it
        self._handle = handle
        handle.truncate(0)
        handle.write(b" %d\n" % os.getpid())

    def _is_current(self, handle: IO[bytes]) -> bool:
        try:
            return os.path.samestat(os.fstat(handle.fileno()), self.path.stat())
        except FileNotFoundError:
            return False

    def release(self, *, remove: bool = False) -> None:
        """Give the lock up, and delete its file on request."""
        if remove and os.name != "nt":  # while it is held, so that no other process's file is deleted
            self.path.unlink(missing_ok=True)
        self._handle.close()
        if remove and os.name == "nt":
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)


def _lock(handle: IO[bytes]) -> None:
    if os.name == "nt":
        import msvcrt

        handle.seek(0)
        msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        return
    import fcntl

    fcntl.flock(handle.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)


def _owner(handle: IO[bytes]) -> str:
    """Words for the process that wrote its number into the lock, as far as it can be read."""
    try:
        handle.seek(1)  # the first byte is what Windows locks
        return f" (number {int(handle.read(20))})"
    except (OSError, ValueError):
        return ""


def write_all(handle: IO[bytes], data: bytes) -> None:
    """Write bytes into an unbuffered file, which may take them in parts."""
    view = memoryview(data)
    while view:
        view = view[handle.write(view) :]


@contextlib.contextmanager
def naming(path: Path, what: str, temporary: Path | None = None) -> Iterator[None]:
    """Let an OSError of the block say which file it is about, what was being written and how to go on.

    Args:
        temporary: the name that the file has while it is written. Trouble with any other file is passed on as it is.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None and str(error.filename) not in (str(path), str(temporary), str(path.parent)):
            raise
        advice = "make room" if error.errno in FULL else "put that right"
        raise OSError(
            error.errno,
            f"{error.strerror or error}; this was being written: {what}. Everything finished before is kept: {advice}, "
            "then run the same command again",
            str(path),
        ) from error


def sync_folder(folder: Path) -> None:
    """Make the names inside a folder durable, where the system has such a call."""
    if os.name == "nt":
        return
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
