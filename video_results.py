"""Results of the frames of a video: files of each, overlay videos, shares and counts over time."""

import itertools
import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from tqdm import tqdm

from annotation.frame_options import FrameOptions
from annotation.video import LONGEST, Camera, Frame, Video, VideoError, frame_name, write_video
from backends import Forward
from checkpoint import ModelConfig
from image_io import atomic_write, resize_image, write_text
from predictor import TileOptions
from results import Frame as Raster
from results import ResultOptions, Results, Summary, working_folder
from run_folder import shrink_panel
from tables import format_csv

MOVING = ("video", "gif")  # kinds of results that show all frames together
GIF_FRAMES, GIF_SIDE = 150, 480  # most pictures of an animation, and their longer side

T = TypeVar("T")
Item = tuple[Frame, np.ndarray | None]  # a frame, and its numbers or probabilities; None: it was done before


@dataclass(frozen=True)
class Clip:
    """A video file, or with a number a camera; results are named by `name`."""

    name: str
    path: Path
    camera: int | None = None

    def open(self) -> Video:
        """Open it for decoding.

        Raises:
            VideoError, OSError: see Video and Camera.
        """
        return Video(self.path) if self.camera is None else Camera(self.camera)


@dataclass(frozen=True)
class VideoSetup:
    """What is the same for all videos of a run.

    results: how frames become files; its kinds are those of a frame. kinds: all of them, those of MOVING too. reduce:
    frames are read so many times smaller. most: frames taken of each, None: all. digest: see predict.Setup. engine:
    what runs the network. writer: gives TensorBoard's writer of the run. thumbnails: frames of each video shown there.
    """

    configs: list[ModelConfig]
    tiles: TileOptions
    results: ResultOptions
    kinds: tuple[str, ...]
    frames: FrameOptions
    most: int | None
    reduce: float
    full_size: bool
    digest: str
    forward: Forward | None = None
    engine: str = ""
    writer: Callable[[], Any] | None = None
    thumbnails: int = 0


@dataclass
class Clock:
    """Seconds that each frame took to be decoded, predicted and written."""

    decode: list[float] = field(default_factory=list)
    network: list[float] = field(default_factory=list)
    write: list[float] = field(default_factory=list)

    def percentiles(self) -> dict[str, list[float]]:
        """Median and 95th percentile of each, in milliseconds."""
        return {
            name: [round(1000 * float(value), 2) for value in np.percentile(seconds, (50, 95))]
            for name, seconds in asdict(self).items()
            if seconds
        }


class Journal:
    """Which frames are done: a row for each, kept in a file of the working folder for a run that goes on.

    rows: by number, with frame, seconds, shares, objects and files.
    """

    def __init__(self, path: Path, folder: Path, digest: str, *, keep: bool) -> None:
        """Take over what an earlier run with the same digest noted, if its files are still there.

        Args:
            path: of the journal. folder: of the results. keep: go on, and note what is done; else begin anew.
        """
        self.path, self.keep = path, keep
        self.rows: dict[int, dict[str, Any]] = {}
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if keep and path.is_file() else []
        if lines and lines[0] == json.dumps(digest):
            for line in lines[1:]:
                try:
                    row = json.loads(line)
                except ValueError:  # cut short by the kill
                    break
                if all((folder / name).is_file() for name in row["files"]):
                    self.rows[row["frame"]] = row
        text = "".join(json.dumps(each) + "\n" for each in (digest, *self.rows.values()))
        if keep:
            write_text(path, text)

    def add(self, row: dict[str, Any]) -> None:
        """Note a frame whose files are there."""
        self.rows[row["frame"]] = row
        if self.keep:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


# ----------------------------------------------------------------------------------------------------------------------
# Files


class Board:
    """TensorBoard's page of one video: shares and objects over time, and frames spread over it."""

    def __init__(self, setup: VideoSetup, clip: Clip, expected: int) -> None:
        """Open nothing yet. expected: about how many frames will come."""
        self.name, self.writer = clip.name, setup.writer if setup.thumbnails else None
        self.left, self.every = setup.thumbnails, max(1, expected // max(1, setup.thumbnails))

    def wants(self, index: int) -> bool:
        """Whether the picture of the index-th frame is to be shown."""
        return self.writer is not None and self.left > 0 and index % self.every == 0

    def add(self, frame: Frame, summary: Summary, index: int) -> None:
        """Show a frame's numbers, and its picture if it is wanted."""
        if self.writer is None:
            return
        writer = self.writer()
        for what, values in (("share", summary.shares), ("objects", summary.objects or {})):
            for key, value in values.items():
                writer.add_scalar(f"{self.name} {what}/{key}", float(value), frame.number)
        if self.wants(index) and summary.picture is not None:
            writer.add_image(f"predict/{self.name}", shrink_panel(summary.picture), frame.number, dataformats="HWC")
            self.left -= 1


def write_frames(
    predicted: Iterator[Item], setup: VideoSetup, clip: Clip, clock: Clock, journal: Journal, board: Board
) -> Iterator[np.ndarray]:
    """Write the results of each frame; yields its overlay (h, w, 3) uint8 where one is needed."""
    moving = bool(set(MOVING) & set(setup.kinds))

    def write(index: int, frame: Frame, probs: np.ndarray) -> tuple[int, Frame, Summary, float]:
        begin = time.perf_counter()
        wanted = moving or board.wants(index)
        summary = write_frame(frame, probs, frame_name(clip.path, frame.number), setup, wanted=wanted)
        return index, frame, summary, time.perf_counter() - begin

    writers = max(1, setup.tiles.ahead)
    with (
        tqdm(desc=clip.name[:40], leave=False, disable=None, unit="frame", initial=len(journal.rows)) as bar,
        ThreadPoolExecutor(writers) as pool,
    ):
        jobs = (
            pool.submit(write, index, frame, probs)
            for index, (frame, probs) in enumerate(predicted)
            if probs is not None
        )
        for index, frame, summary, seconds in take_in_order(jobs, writers):
            bar.update()
            begin = time.perf_counter()
            files = [path.relative_to(setup.results.folder).as_posix() for path in summary.files]
            shares = {key: float(value) for key, value in summary.shares.items()}
            row = {"frame": frame.number, "seconds": round(frame.seconds, 4), "shares": shares}
            journal.add({**row, "objects": summary.objects, "files": files})
            board.add(frame, summary, index)
            if moving and summary.picture is not None:
                yield summary.picture
            clock.write.append(seconds + time.perf_counter() - begin)  # with what is made of the picture


def take_in_order(jobs: Iterator[Future[T]], depth: int) -> Iterator[T]:
    """Results of jobs, in their order, of which `depth` more are begun than were taken."""
    waiting = deque(itertools.islice(jobs, depth))
    while waiting:
        waiting.extend(itertools.islice(jobs, 1))
        yield waiting.popleft().result()


def write_frame(frame: Frame, probs: np.ndarray, name: str, setup: VideoSetup, *, wanted: bool) -> Summary:
    """Write the results of one frame, as those of a picture."""
    height, width = probs.shape[1:]
    raster = Raster(name, height, width, 1.0 if setup.full_size else setup.reduce)

    def shown(step: int) -> np.ndarray:
        return resize_image(frame.image, (-(-height // step), -(-width // step)))

    with Results(raster, setup.configs[0], setup.results, setup.digest) as results:
        results.add(probs)
        return results.finish(shown, with_picture=wanted, side=LONGEST)


class Pictures:
    """Overlays on their way into a video and an animation; remembers whether making them failed."""

    def __init__(self, source: Iterator[np.ndarray]) -> None:
        self.source, self.failed, self.count = source, False, 0

    def __iter__(self) -> Iterator[np.ndarray]:
        try:
            for picture in self.source:
                self.count += 1
                yield picture
        except GeneratorExit:  # the consumer stopped, not the source
            raise
        except BaseException:
            self.failed = True
            raise


@dataclass
class Animation:
    """Every stride-th picture of a video, as few and small as a GIF can bear."""

    stride: int = 1
    seen: int = 0
    images: list[Image.Image] = field(default_factory=list)

    def collect(self, pictures: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Hand the pictures on, and keep some of them."""
        for picture in pictures:
            if self.seen % self.stride == 0:
                if len(self.images) == GIF_FRAMES:
                    self.images, self.stride = self.images[::2], 2 * self.stride
                if self.seen % self.stride == 0:
                    image = Image.fromarray(picture)
                    image.thumbnail((GIF_SIDE, GIF_SIDE))
                    self.images.append(image.quantize(256, method=Image.Quantize.FASTOCTREE))  # 14 times as fast
            self.seen += 1
            yield picture

    def write(self, path: Path, fps: float) -> None:
        """Write what was kept as a GIF that plays as fast as the video."""
        size = self.images[0].size
        images = [each if each.size == size else each.resize(size) for each in self.images]
        with atomic_write(path) as file:
            duration = max(20, round(1000 * self.stride / fps))  # shorter ones are played slowly
            images[0].save(file, "GIF", save_all=True, append_images=images[1:], duration=duration, loop=0)


def write_moving(pictures: Pictures, setup: VideoSetup, name: str, fps: float) -> tuple[list[Path], list[str]]:
    """Make all pictures, and what shows them together; frames are done even if no video can be written here.

    Returns:
        The files, and why others were not written.
    """
    files, failures, animation = [], list[str](), Animation()
    source = animation.collect(pictures) if "gif" in setup.kinds else iter(pictures)
    if "video" in setup.kinds:
        path = setup.results.folder / "videos" / f"{name}.mp4"
        waiting = working_folder(setup.results.folder, name) / path.name  # what a kill leaves is in there
        try:
            if write_video(waiting, source, fps):
                path.parent.mkdir(parents=True, exist_ok=True)
                waiting.replace(path)
                files.append(path)
        except VideoError as error:
            if pictures.failed:
                raise
            failures.append(str(error))
            source = animation.collect(pictures) if "gif" in setup.kinds else iter(pictures)
    deque(source, maxlen=0)
    if animation.images:
        path = setup.results.folder / "gifs" / f"{name}.gif"
        animation.write(path, fps)
        files.append(path)
    return files, failures


def write_table(setup: VideoSetup, clip: Clip, rows: Sequence[Mapping[str, Any]]) -> Path:
    """over_time/<video>.csv: of each frame its time, the share of each class, and objects where they were counted."""
    shares, objects = (rows[0][key] or {} for key in ("shares", "objects"))
    columns = ["video", "frame", "seconds", "image"]
    columns += [*(f"share_{name}" for name in shares), *(f"objects_{name}" for name in objects)]
    path = setup.results.folder / "over_time" / f"{clip.name}.csv"
    cells = [
        {
            "video": clip.path.name,
            "frame": row["frame"],
            "seconds": float(row["seconds"]),
            "image": frame_name(clip.path, row["frame"]),
            **{f"share_{name}": float(value) for name, value in row["shares"].items()},
            **{f"objects_{name}": value for name, value in (row["objects"] or {}).items()},
        }
        for row in sorted(rows, key=lambda row: row["frame"])
    ]
    write_text(path, format_csv(columns, cells, setup.results.decimal))
    return path
