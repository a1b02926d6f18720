"""Predict the frames of videos and cameras: results of each frame, overlay videos, shares and counts over time.

Decoding, the network and writing work at the same time, each in a thread of its own; memory holds a few frames. A frame
is predicted as a picture of its pixels would be, and its files are those of a picture named <video>_<frame>.
"""

import hashlib
import itertools
import json
import shutil
import signal
import threading
import time
import uuid
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from annotation.frame_options import FrameOptions
from annotation.video import LONGEST, PLAYED, Frame, Video, VideoError
from backends import megapixels_seen
from cli import UsageError
from image_io import normalise, preprocess, resize_image
from pairing import Pair
from predictor import common_sides
from result_record import begin_record, end_record, is_frame_of
from results import Frame as Raster
from results import disk_needed, working_folder
from spool import FolderLock
from tiling import TTA, plan_axis, predict_bands, read_tile, reflect_index, run_ahead, turned, window_reader
from video_results import (
    MOVING,
    Board,
    Clip,
    Clock,
    Item,
    Journal,
    Pictures,
    VideoSetup,
    write_frames,
    write_moving,
    write_table,
)

UNKNOWN_FRAMES = 1000  # of a camera, or of a video that does not declare how many it has
GREY = np.array([0.299, 0.587, 0.114], np.float32)


def find_clips(words: Sequence[str]) -> tuple[list[Clip], list[str]]:
    """The cameras among the words of -i, which are numbers that no file is called, and the other words."""
    cameras = {word: int(word) for word in words if word.isdecimal() and not Path(word).exists()}
    clips = [Clip(f"camera_{number}", Path(f"camera_{number}"), number) for number in dict.fromkeys(cameras.values())]
    return clips, [word for word in words if word not in cameras]


def check_names(pairs: Sequence[Pair], clips: Sequence[Clip]) -> None:
    """Refuse inputs whose results would have one name; a video's frames have names too."""
    names: dict[str, Path] = {}
    for name, path in [*((pair.name, pair.image) for pair in pairs), *((clip.name, clip.path) for clip in clips)]:
        other = names.get(name) or next((clip.path for clip in clips if is_frame_of(clip.name, name)), None)
        if other:
            raise UsageError(
                f"{other} and {path} would both write results named {name!r}; "
                "rename one, or predict them into two folders"
            )
        names[name] = path


def check_flags(args: Any, *, images: bool, videos: bool) -> None:
    """Refuse flags that say nothing about what there is.

    Raises:
        UsageError: kinds of results that are not for images, or flags that are for nothing but them.
    """
    if images and set(args.save) <= set(MOVING):
        what = "the images among the input" if videos else "images"
        raise UsageError(f"--save {','.join(args.save)} is for videos; save something of {what} too, such as mask")
    if not videos and set(args.save) & set(MOVING):
        raise UsageError(f"--save {','.join(args.save)}: no video to make that of; give one with -i")
    asked = [f"--{name}" for name in ("mpp", "level") if getattr(args, name) is not None]
    asked += [f"--tissue {args.tissue}"] if args.tissue not in ("auto", "none") else []
    asked += [f"--format {args.format}"] if args.format not in ("auto", "png") else []
    if videos and asked:
        raise UsageError(f"{' '.join(asked)}: not for videos, whose frames become PNG; predict them without")


def clip_digest(setup: VideoSetup, clip: Clip) -> str:
    """Of the flags, the checkpoints and the file; what a camera shows is never the same again."""
    facts: list[Any] = [setup.digest, asdict(setup.frames), setup.most]
    if clip.camera is not None:
        facts.append(uuid.uuid4().hex)
    else:
        status = clip.path.stat()
        facts.append([str(clip.path.resolve()), status.st_size, status.st_mtime_ns])
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# One video


def predict_video(setup: VideoSetup, clip: Clip, digest: str) -> tuple[str, list[str]]:
    """Predict a video and write its results.

    A run that was killed goes on behind the frames that are there, unless one file is made of all frames (MOVING);
    then it begins anew.

    Returns:
        What came out in one line, and what was wrong with the video.

    Raises:
        VideoError, OSError: it cannot be decoded, or results cannot be written.
        JobError: another process predicts it into this folder.
    """
    work = working_folder(setup.results.folder, clip.name)
    work.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(work)
    try:
        told = _predict(setup, clip, digest, work)
    finally:
        lock.release(remove=True)
        with suppress(OSError):  # unless something is in it
            work.rmdir()
    shutil.rmtree(work, ignore_errors=True)
    return told


def _predict(setup: VideoSetup, clip: Clip, digest: str, work: Path) -> tuple[str, list[str]]:
    folder, clock, begin = setup.results.folder, Clock(), time.perf_counter()
    keep = not set(MOVING) & set(setup.kinds)
    with clip.open() as video, stop_on_interrupt(enabled=clip.camera is not None) as stop:
        journal = Journal(work / "frames.jsonl", folder, f"{digest} {setup.engine}", keep=keep)
        begin_record(folder, clip.name, digest, setup.kinds, {"scale": setup.reduce, "mpp": None})
        items: Iterator[Item] = decode(video, setup, clock, journal.rows, stop)
        if setup.tiles.ahead and clip.camera is None:
            items = run_ahead(items, setup.tiles.ahead)
        network = Network(setup, clock, batch=1 if clip.camera is not None else setup.tiles.batch)
        predicted = run_ahead(network.predict(items), 1)
        board = Board(setup, clip, frames_taken(video, setup))
        pictures = Pictures(write_frames(predicted, setup, clip, clock, journal, board))
        rate = video.fps / setup.frames.step if setup.frames.fps is None else min(video.fps, setup.frames.fps)
        try:
            moving, failures = write_moving(pictures, setup, clip.name, min(max(rate, PLAYED[0]), PLAYED[1]))
        finally:
            predicted.close()
        failures += [] if setup.most is not None else video.findings()
    rows = journal.rows
    if not rows:
        raise VideoError(f"{clip.path} gave no frame; expected at least one: look at --fps, --step and the video")
    table = write_table(setup, clip, list(rows.values()))
    files = [*moving, table, *(folder / name for row in rows.values() for name in row["files"])]
    seconds = time.perf_counter() - begin
    speed, latency = len(clock.write) / seconds, clock.percentiles()
    facts = {"damage": failures, "scale": setup.reduce, "mpp": None, "frames": len(rows)}
    facts |= {"frames_per_second": round(speed, 2), "latency_ms": latency} if clock.write else {}
    end_record(folder, clip.name, digest, setup.kinds, files, facts, durable=True)
    return _tell(len(rows), len(clock.write), seconds, latency, network.batch), failures


def _tell(count: int, made: int, seconds: float, latency: Mapping[str, Sequence[float]], batch: int) -> str:
    """One line for the terminal."""
    text = f"{count} frames" if made == count else f"{count} frames, {count - made} of them done before"
    if made:
        text += f"; {made} in {seconds:.1f} s, {made / seconds:.2f} frames/s; p50 / p95 of a frame:"
        text += ",".join(f" {name} {low:.1f} / {high:.1f} ms" for name, (low, high) in latency.items())
        text += f" (network: batches of {batch})" if batch > 1 else ""
    return text


@contextmanager
def stop_on_interrupt(*, enabled: bool) -> Iterator[threading.Event]:
    """An event that Ctrl-C sets the first time, so that a recording ends well; the second time it interrupts."""
    stop = threading.Event()
    if not enabled or threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.getsignal(signal.SIGINT)

    def handle(*_: object) -> None:
        stop.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


# ----------------------------------------------------------------------------------------------------------------------
# Frame -> numbers -> probabilities


def decode(
    video: Video, setup: VideoSetup, clock: Clock, done: Mapping[int, Any], stop: threading.Event
) -> Generator[Item, None, None]:
    """Frames and the network's numbers (C, h, w) float32 of those that are not done."""
    known = frozenset(done)
    frames = itertools.islice(video.frames(setup.frames), setup.most)
    while not stop.is_set():
        begin = time.perf_counter()
        frame = next(frames, None)
        if frame is None:
            break
        if frame.number in known:
            yield frame, None
            continue
        numbers = read_numbers(frame.image, setup)
        clock.decode.append(time.perf_counter() - begin)
        yield frame, numbers


def grid_size(image: np.ndarray, reduce: float) -> tuple[int, int]:
    """Height and width of the raster that a frame (H, W, 3) is predicted on."""
    height, width = (max(1, int(side / reduce + 0.5)) for side in image.shape[:2])
    return height, width


def read_numbers(image: np.ndarray, setup: VideoSetup) -> np.ndarray:
    """A frame (H, W, 3) uint8 as what the networks see: (C, h, w) float32, for M networks (M * C, h, w).

    Raises:
        VideoError: the network takes neither three channels nor one.
    """
    config = setup.configs[0]
    if len(config.channels) not in (1, 3):
        raise VideoError(
            f"the network takes {len(config.channels)} channels ({' '.join(config.channels)}), frames of videos have "
            "3; use a checkpoint that was trained on pictures in colour or grey"
        )
    if len(config.channels) == 1:
        image = np.rint(image @ GREY).astype(np.uint8)[:, :, None]
    pixels = resize_image(preprocess(image, config.preprocess), grid_size(image, setup.reduce))
    if config.geometry.kind == "resize":
        pixels = resize_image(pixels, config.geometry.size)
    parts = [normalise(pixels, each.mean, each.std) for each in setup.configs]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


class Network:
    """Runs the network over frames, several at once where each is one tile."""

    def __init__(self, setup: VideoSetup, clock: Clock, *, batch: int) -> None:
        if setup.forward is None:
            raise ValueError("the setup has no network, expected `forward`")
        self.setup, self.clock, self.batch = setup, clock, batch
        self.forward = turned(setup.forward, TTA[setup.tiles.tta])

    def predict(self, items: Iterator[Item]) -> Generator[Item, None, None]:
        """Probabilities (K, h, w) float32 of each frame, in the same order."""
        waiting: list[tuple[Frame, np.ndarray]] = []
        try:
            for frame, numbers in items:
                if waiting and (numbers is None or numbers.shape != waiting[0][1].shape):
                    yield from self._run(waiting)
                    waiting = []
                if numbers is None:
                    yield frame, None
                    continue
                waiting.append((frame, numbers))
                if len(waiting) == self.batch or not self._is_one_tile(numbers):
                    yield from self._run(waiting)
                    waiting = []
            if waiting:
                yield from self._run(waiting)
        finally:
            if isinstance(items, Generator):
                items.close()

    def _axes(self, numbers: np.ndarray) -> list[Any]:
        options, (stride, min_side) = self.setup.tiles, common_sides(self.setup.configs)
        return [
            plan_axis(
                size,
                tile=options.tile,
                overlap=options.overlap,
                halo=options.halo,
                stride=stride,
                min_side=min_side,
                window=options.window,
            )
            for size in numbers.shape[1:]
        ]

    def _is_one_tile(self, numbers: np.ndarray) -> bool:
        resized = self.setup.configs[0].geometry.kind == "resize"
        return resized or all(len(axis.origins) == 1 for axis in self._axes(numbers))

    def _run(self, waiting: Sequence[tuple[Frame, np.ndarray]]) -> Iterator[Item]:
        begin = time.perf_counter()
        batch = [numbers for _, numbers in waiting]
        if self.setup.configs[0].geometry.kind == "resize":
            probs = list(self.setup.forward(np.stack(batch)))  # type: ignore[misc]
        elif self._is_one_tile(batch[0]):
            rows, cols = self._axes(batch[0])
            places = [reflect_index(axis.size, axis.frame) for axis in (rows, cols)]
            tiles = self.forward(np.stack([read_tile(window_reader(numbers), *places) for numbers in batch]))
            probs = list(np.asarray(tiles, np.float32)[:, :, : rows.size, : cols.size])
        else:
            probs = [self._tiled(numbers) for numbers in batch]
        wanted = [grid_size(frame.image, 1 if self.setup.full_size else self.setup.reduce) for frame, _ in waiting]
        fitted = [_fit(each, size) for each, size in zip(probs, wanted, strict=True)]
        self.clock.network += [(time.perf_counter() - begin) / len(waiting)] * len(waiting)
        for (frame, _), each in zip(waiting, fitted, strict=True):
            if not np.isfinite(each.sum()):
                raise ValueError(f"frame {frame.number}: the network's probabilities are not finite")
            yield frame, each

    def _tiled(self, numbers: np.ndarray) -> np.ndarray:
        rows, cols = self._axes(numbers)
        options, forward = self.setup.tiles, self.setup.forward
        bands = predict_bands(
            window_reader(numbers),
            forward,  # type: ignore[arg-type]
            rows,
            cols,
            batch_size=options.batch,
            tta=options.tta,
        )
        return np.concatenate([band.copy() for _, band in bands], axis=1)


def _fit(probs: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Probabilities (K, h, w) at another size (height, width)."""
    if probs.shape[1:] == size:
        return probs
    return np.ascontiguousarray(resize_image(probs.transpose(1, 2, 0), size).transpose(2, 0, 1))


# ----------------------------------------------------------------------------------------------------------------------
# Before a run


def measure_clip(setup: VideoSetup, clip: Clip) -> tuple[int, tuple[int, int], int]:
    """About how many frames are taken, their (height, width), and tiles of each; of a camera nothing is opened.

    Raises:
        VideoError, OSError: see Video.
    """
    size, count, geometry = (720, 1280), setup.most or UNKNOWN_FRAMES, setup.configs[0].geometry
    if clip.camera is None:
        with Video(clip.path) as video:
            size = next(iter(video.frames(FrameOptions()))).image.shape[:2]
            count = frames_taken(video, setup)
    height, width = (max(1, int(side / setup.reduce + 0.5)) for side in size)
    tiles = 1
    if geometry.kind != "resize":
        probe = Network(replace(setup, forward=lambda batch: batch), Clock(), batch=1)
        tiles = int(np.prod([len(axis.origins) for axis in probe._axes(np.empty((0, height, width)))]))
    return count, (height, width), tiles


def frames_taken(video: Video, setup: VideoSetup) -> int:
    """About how many frames of an opened video are taken."""
    share = 1 / setup.frames.step if setup.frames.fps is None else min(1.0, setup.frames.fps / video.fps)
    count = max(1, int((video.declared or UNKNOWN_FRAMES) * share + 0.999))
    return count if setup.most is None else min(count, setup.most)


def clip_disk(setup: VideoSetup, name: str, count: int, size: tuple[int, int]) -> tuple[int, int]:
    """Bytes on disk of a video's results, likely and at most; of overlay videos roughly, for they compress unevenly."""
    scale = 1.0 if setup.full_size else setup.reduce
    height, width = (round(side * setup.reduce) for side in size) if setup.full_size else size
    likely, most = disk_needed(Raster(name, height, width, scale), setup.configs[0], setup.results)
    shown = height * width * min(1.0, LONGEST / max(height, width)) ** 2 if set(MOVING) & set(setup.kinds) else 0
    return count * (likely + round(0.1 * shown)), count * (most + round(shown))


def sum_clips(setup: VideoSetup, clips: Sequence[Clip]) -> float:
    """About how many megapixels the network sees of them; those that cannot be opened are named in their turn."""
    total, config = 0.0, setup.configs[0]
    tiled = replace(config.geometry, tile=setup.tiles.tile, overlap=setup.tiles.overlap, tta=setup.tiles.tta)
    for clip in clips:
        try:
            count, (height, width), _ = measure_clip(setup, clip)
        except (OSError, ValueError):
            continue
        seen = replace(config, geometry=replace(tiled, reduction=1))
        total += count * megapixels_seen(seen, height * width)
    return total
