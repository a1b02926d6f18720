"""Videos as input: frames as pictures that can be annotated, and how their objects change over time.

Videos are decoded from the first frame to the last, for seeking is slow and inexact where frames are stored as
differences. What a video's rotation tag says is applied. Damage is named, and every frame that can be decoded is kept.
"""

import contextlib
import hashlib
import json
import os
import re
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from annotation.frame_options import FrameOptions
from image_headers import ImageError
from image_io import file_stem, write_image, write_text
from plots import time_curves
from spool import FolderLock
from tables import format_csv

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".m4v", ".webm", ".mpg", ".mpeg", ".wmv", ".ts", ".mts", ".m2ts")
MANIFEST, RECORDS = "frames.csv", ".frames"
MANIFEST_COLUMNS = ("video", "frame", "seconds", "file")
SIZES = ("diameter_mean", "diameter_median", "diameter_p10", "diameter_p90", "diameter_sauter")
FRAME_COLUMNS = ("video", "frame", "seconds", "file", "objects", "area", *SIZES)
TRIES = 16  # frames in a row that cannot be decoded before the rest is given up
SPOTS = 64  # along the longer side of a frame: what frames are compared by
PLAYED = 2.0, 60.0  # slowest and fastest frames per second of an overlay video
LONGEST = 1920  # pixels of the longer side of an overlay video
FORMAT = 1  # raised when the same flags give other frames

# Read when OpenCV decodes its first video; FFmpeg prints a hundred lines for a damaged frame, without the file's name.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")


class VideoError(ImageError):
    """A file that is no video, or one that cannot be decoded or written here."""


@dataclass(frozen=True, eq=False)
class Frame:
    """A decoded frame: its number from 0, its time in the video, (H, W, 3) uint8 RGB."""

    number: int
    seconds: float
    image: np.ndarray


@dataclass(frozen=True)
class Extracted:
    """The frames of a video on the disk: rows of MANIFEST_COLUMNS, what is wrong, whether they were there before."""

    rows: list[dict[str, Any]]
    findings: list[str]
    was_done: bool = False


def list_videos(places: Sequence[Path]) -> list[Path]:
    """The videos among files and directly inside folders, sorted; hidden files are left out.

    Raises:
        FileNotFoundError: a place does not exist.
        VideoError: there is none, or two share a stem, which their frames are named by.
    """
    found: dict[str, Path] = {}
    for place in map(Path, places):
        if not place.exists():
            raise FileNotFoundError(f"{place} does not exist; expected a video, or a folder of videos")
        inside = sorted(place.iterdir()) if place.is_dir() else [place]
        for path in inside:
            if place.is_dir() and (path.suffix.lower() not in VIDEO_SUFFIXES or path.name.startswith(".")):
                continue
            stem = file_stem(path).lower()
            if stem in found and found[stem].resolve() != path.resolve():
                raise VideoError(
                    f"{found[stem]} and {path} share the stem {file_stem(path)!r}, which their frames are named by; "
                    "expected one video of each name: rename one"
                )
            found[stem] = path
    if not found:
        listed = ", ".join(map(str, places))
        raise VideoError(f"{listed}: no video there; expected files that end in {' '.join(VIDEO_SUFFIXES)}")
    return sorted(found.values())


# ----------------------------------------------------------------------------------------------------------------------
# Decoding


class Video:
    """An open video; a context manager.

    Attributes:
        path: of the file.
        fps: frames per second as declared, or 25 where the file does not say.
        declared: frames that the file declares, or 0.
        times: of all frames decoded so far, in seconds.
    """

    def __init__(self, path: Path) -> None:
        """Open the file.

        Raises:
            VideoError: it cannot be opened as a video.
            OSError: no such file, or it cannot be read.
        """
        self.path = Path(path)
        with self.path.open("rb") as handle:
            empty = not handle.read(1)
        self._capture = _open_quietly(self.path.resolve())
        self.times: list[float] = []
        if not self._capture.isOpened():
            reason = "it is empty" if empty else "it is damaged, no video, or was cut short before its index"
            raise VideoError(
                f"{self.path} cannot be opened as a video: {reason}, or OpenCV lacks its decoder; expected a video "
                "that plays: copy it again, or convert it, for instance with ffmpeg -i OLD -c:v libx264 NEW.mp4"
            )
        self.fps = self._rate()
        count = self._capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self.declared = int(count) if 0 < count < 1e9 else 0

    def _rate(self) -> float:
        rate = self._capture.get(cv2.CAP_PROP_FPS)
        return rate if 0 < rate < 10_000 else 25.0

    def __enter__(self) -> "Video":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._capture.release()

    def frames(self, options: FrameOptions) -> Iterator[Frame]:
        """Decode from the beginning, once; frames that are not taken are decoded but not converted.

        Raises:
            VideoError: not one frame can be decoded.
        """
        if self.times:
            raise ValueError(f"{self.path} was decoded already; open it again")
        last, shown = -1, None
        for number, seconds in self._grabbed():
            slot = number // options.step if options.fps is None else int(seconds * options.fps + 1e-6)
            if slot == last:
                continue
            done, image = self._capture.retrieve()
            if not done or image is None:
                continue
            image = _to_rgb(image)
            last = slot
            if options.skip_similar is not None:
                spots = _spots(image)
                if shown is not None and _differ_by(shown, spots) <= options.skip_similar:
                    continue
                shown = spots
            yield Frame(number, seconds, image)
        if not self.times:
            raise VideoError(
                f"{self.path} was opened as a video, but not one of its frames can be decoded; expected a video that "
                "plays: copy or convert it again"
            )

    def _grabbed(self) -> Iterator[tuple[int, float]]:
        """Number and time of each frame that can be decoded."""
        failed = 0
        while failed < TRIES:
            if not self._capture.grab():
                failed += 1
                continue
            failed = 0
            number, previous = len(self.times), self.times[-1] if self.times else -1.0
            seconds = self._clock()
            if not previous < seconds < float("inf"):  # no time stamps
                seconds = previous + 1 / self.fps if self.times else 0.0
            self.times.append(seconds)
            yield number, seconds

    def _clock(self) -> float:
        return self._capture.get(cv2.CAP_PROP_POS_MSEC) / 1000

    def findings(self) -> list[str]:
        """What is wrong with the video, once all of it was decoded."""
        times = np.array(self.times)
        steps = np.diff(times)
        if not self.declared or not len(times):
            return []
        steady = len(steps) > 0 and abs(float(np.median(steps)) * self.fps - 1) < 0.1
        length, end = self.declared / self.fps, float(times[-1] - times[0]) + 1 / self.fps
        advice = "the frames that could be decoded are kept: copy or export the video again to have all"
        if end < length - max(0.1, 2 / self.fps):
            return [
                f"{self.path} ends after {len(times)} frames, at {end:.2f} s, but declares {self.declared} frames, "
                f"{length:.2f} s: it was cut short or is damaged; {advice}"
            ]
        lost = self.declared - len(times)
        if not steady or lost < 2:
            return []
        gaps = np.flatnonzero(steps > 1.5 / self.fps)
        where = f", the first after {times[gaps[0]]:.2f} s" if len(gaps) else ""
        return [f"{self.path}: {lost} of its {self.declared} frames are damaged or missing{where}; {advice}"]


class Camera(Video):
    """A camera that is open; times are those at which its frames arrive, and it ends when it gives no more."""

    def __init__(self, number: int) -> None:
        """Open the camera.

        Raises:
            VideoError: there is none of this number, or it is in use.
        """
        self.path, self.declared, self.times = Path(f"camera_{number}"), 0, []
        self._begin: float | None = None
        self._capture = _open_camera(number)
        if not self._capture.isOpened():
            raise VideoError(
                f"camera {number} cannot be opened: there is none of this number, another program uses it, or it may "
                "not be read; expected a camera that works: cameras count from 0, and files are given by their names"
            )
        self._capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)  # a frame that waited is an old one
        self.fps = self._rate()

    def _clock(self) -> float:
        now = time.monotonic()
        self._begin = now if self._begin is None else self._begin
        return now - self._begin


def _open_camera(number: int) -> cv2.VideoCapture:
    with _quiet():
        return cv2.VideoCapture(number)


def _open_quietly(path: Path) -> cv2.VideoCapture:
    """Without OpenCV's own lines about files that are no videos; ours name the file and what to do."""
    registry = cv2.videoio_registry
    backend = cv2.CAP_FFMPEG if cv2.CAP_FFMPEG in registry.getStreamBackends() else cv2.CAP_ANY
    with _quiet():
        return cv2.VideoCapture(str(path), backend)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logging = cv2.utils.logging
    level = logging.setLogLevel(logging.LOG_LEVEL_SILENT)
    try:
        yield
    finally:
        logging.setLogLevel(level)


def _to_rgb(image: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(image, cv2.COLOR_GRAY2RGB if image.ndim == 2 or image.shape[2] == 1 else cv2.COLOR_BGR2RGB)


def _spots(image: np.ndarray) -> np.ndarray:
    """Mean colours of the spots of a frame, (h, w, 3) float32; noise averages out, what moves does not."""
    height, width = image.shape[:2]
    scale = min(1.0, SPOTS / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return cv2.resize(image.astype(np.float32), size, interpolation=cv2.INTER_AREA)


def _differ_by(one: np.ndarray, other: np.ndarray) -> float:
    return float("inf") if one.shape != other.shape else float(np.abs(one - other).max())


# ----------------------------------------------------------------------------------------------------------------------
# Frames as files


def frame_name(video: Path, number: int) -> str:
    """The stem of a frame's file, and so of its labels: <video>_<frame number, 6 digits>."""
    return f"{file_stem(video)}_{number:06d}"


def extract_frames(path: Path, folder: Path, options: FrameOptions) -> Extracted:
    """Write the chosen frames of a video, and go on where an earlier run with the same options stopped.

    Files that are there are not written again. A finished video is not decoded again.

    Args:
        path: the video.
        folder: gets <video>_<number>.png or .jpg, and notes in a hidden folder.
        options: which frames.

    Raises:
        VideoError: it is no video, or the folder holds frames of this name that were made otherwise.
        JobError: another process writes frames into the folder.
        OSError: a file cannot be read or written.
    """
    notes = Path(folder) / RECORDS
    notes.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(notes)
    try:
        return _extract(Path(path), Path(folder), options)
    finally:
        lock.release(remove=True)


def _extract(path: Path, folder: Path, options: FrameOptions) -> Extracted:
    record = folder / RECORDS / f"{file_stem(path)}.json"
    head = {"format": FORMAT, "video": path.name, "digest": _digest(path), "options": asdict(options)}
    known = _read_record(record)
    if known is None:
        _refuse_foreign(path, folder)
    elif {key: known.get(key) for key in head} != head:
        same = known.get("digest") == head["digest"]
        found = f"other flags ({known.get('options')})" if same else "another video of this name"
        raise VideoError(
            f"{folder} holds frames of {path.name} that were made from {found}; expected the same again: give another "
            f"folder, or delete them together with {record}"
        )
    elif known.get("done") and all((folder / row["file"]).is_file() for row in known["rows"]):
        return Extracted(known["rows"], known["findings"], was_done=True)
    with Video(path) as video:
        write_text(record, json.dumps(head | {"done": False}) + "\n")
        remove_leftovers(folder)
        rows = []
        with tqdm(total=video.declared or None, desc=path.name, leave=False, disable=None, unit="frame") as bar:
            for frame in video.frames(options):
                name = frame_name(path, frame.number) + options.suffix
                if not (folder / name).is_file():  # whole, for files appear under their names when they are
                    write_image(folder / name, frame.image)
                seconds = round(frame.seconds, 4)
                rows.append({"video": path.name, "frame": frame.number, "seconds": seconds, "file": name})
                bar.update(frame.number + 1 - bar.n)
        findings = video.findings()
    write_text(record, json.dumps(head | {"done": True, "rows": rows, "findings": findings}) + "\n")
    return Extracted(rows, findings)


def _digest(path: Path) -> str:
    """Of the size and both ends of a file, so that a copy counts as the same video."""
    size, part = path.stat().st_size, 1 << 20
    with path.open("rb") as handle:
        content = handle.read(part)
        handle.seek(max(0, size - part))
        content += handle.read(part)
    return hashlib.sha256(content + str(size).encode()).hexdigest()


def _read_record(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(known, dict):
            raise ValueError("no object of JSON")
    except ValueError as error:
        raise VideoError(f"{path} is damaged ({error}); expected what an earlier run noted: delete it") from error
    return known


def _refuse_foreign(path: Path, folder: Path) -> None:
    pattern = re.compile(re.escape(file_stem(path)) + r"_\d{6,}\.(png|jpg)")
    other = next((each.name for each in folder.iterdir() if pattern.fullmatch(each.name)), None)
    if other is not None:
        raise VideoError(
            f"{folder / other} would be a frame of {path.name}, but no earlier run noted that it wrote it; expected a "
            "folder without such files: give another folder, or move them"
        )


def remove_leftovers(folder: Path) -> None:
    """Delete the hidden half-written files that a kill left in a folder of frames."""
    for path in folder.glob(".*.tmp"):
        if re.fullmatch(r"\.[0-9a-f]{32}\.tmp", path.name):
            path.unlink(missing_ok=True)


def list_frames(folder: Path) -> list[dict[str, Any]]:
    """Rows of MANIFEST_COLUMNS of all videos whose frames are complete in a folder, by video and frame."""
    known = [_read_record(path) for path in sorted((Path(folder) / RECORDS).glob("*.json"))]
    return [row for record in known if record and record.get("done") for row in record["rows"]]


def write_manifest(folder: Path, decimal: str) -> None:
    """Write frames.csv: which file is which frame of which video, and its time in seconds."""
    write_text(Path(folder) / MANIFEST, format_csv(MANIFEST_COLUMNS, list_frames(folder), decimal))


# ----------------------------------------------------------------------------------------------------------------------
# Over time


def frame_rows(
    frames: Sequence[Mapping[str, Any]], objects: Iterable[Mapping[str, Any]], *, mm_per_pixel: float | None = None
) -> list[dict[str, Any]]:
    """Count and size the objects of each frame.

    Args:
        frames: rows of MANIFEST_COLUMNS.
        objects: rows with image (a frame's file or its stem), area and equivalent_diameter in pixels, in any order;
            those of other images are left out.
        mm_per_pixel: gives areas in square millimetres and diameters in millimetres instead of pixels.

    Returns:
        A row of FRAME_COLUMNS for each frame, in their order; sizes are None where nothing was found. diameter_p10,
        diameter_p90: a tenth of the objects is smaller, larger. diameter_sauter: sum of cubes by sum of squares, the
        mean that ratios of volume to surface follow.
    """
    places: dict[str, int] = {}
    for place, frame in enumerate(frames):
        places |= {str(frame["file"]): place, file_stem(Path(str(frame["file"]))): place}
    areas, diameters = [0.0] * len(frames), [list[float]() for _ in frames]
    scale = 1.0 if mm_per_pixel is None else mm_per_pixel
    for row in objects:
        found = places.get(str(row["image"]))
        if found is not None:
            areas[found] += float(row["area"]) * scale**2
            diameters[found].append(float(row["equivalent_diameter"]) * scale)
    return [
        {
            **{name: frame[name] for name in MANIFEST_COLUMNS},
            "objects": len(sizes),
            "area": int(area) if mm_per_pixel is None else area,
            **_size_summary(np.array(sizes)),
        }
        for frame, area, sizes in zip(frames, areas, diameters, strict=True)
    ]


def _size_summary(sizes: np.ndarray) -> dict[str, float | None]:
    if not len(sizes):
        return dict.fromkeys(SIZES)
    low, middle, high = np.percentile(sizes, (10, 50, 90)).tolist()
    sauter = float((sizes**3).sum() / (sizes**2).sum())
    return dict(zip(SIZES, (float(sizes.mean()), middle, low, high, sauter), strict=True))


def write_time_tables(folder: Path, rows: Sequence[Mapping[str, Any]], *, decimal: str, unit: str = "pixels") -> None:
    """Write over_time.csv, and <video>_over_time.png with the curves of each video.

    Args:
        rows: of frame_rows.
        unit: of the diameters, "pixels" or "mm".
    """
    write_text(Path(folder) / "over_time.csv", format_csv(FRAME_COLUMNS, rows, decimal))
    for video in dict.fromkeys(str(row["video"]) for row in rows):
        own = [row for row in rows if row["video"] == video]
        time_curves(own, video, unit, Path(folder) / f"{file_stem(Path(video))}_over_time.png")


def play_rate(rows: Sequence[Mapping[str, Any]]) -> float:
    """Frames per second at which the frames of one video (rows with seconds) play as fast as life, within PLAYED."""
    steps = np.diff([float(row["seconds"]) for row in rows])
    rate = 1 / float(np.median(steps)) if len(steps) and np.median(steps) > 0 else PLAYED[0]
    return min(max(rate, PLAYED[0]), PLAYED[1])


def write_video(path: Path, pictures: Iterable[np.ndarray], fps: float) -> int:
    """Write pictures as an MPEG-4 video (mp4v), which appears under its name when it is complete.

    Args:
        path: ends in .mp4.
        pictures: (H, W, 3) uint8 RGB. All get the size of the first one, at most LONGEST pixels long, sides even.

    Returns:
        How many there were; no file is written for none.

    Raises:
        VideoError: OpenCV has no encoder here, or the video cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}.mp4")
    try:
        count = _encode(temporary, path, pictures, fps)
        if count:
            _check_written(temporary, path, count)
            temporary.replace(path)
        return count
    finally:
        temporary.unlink(missing_ok=True)


def _encode(temporary: Path, path: Path, pictures: Iterable[np.ndarray], fps: float) -> int:
    writer, size, count = None, (0, 0), 0
    try:
        for picture in pictures:
            if writer is None:
                scale = min(1.0, LONGEST / max(picture.shape[:2]))
                height, width = (max(2, round(side * scale / 2) * 2) for side in picture.shape[:2])
                size = width, height
                writer = _open_writer(temporary, path, fps, size)
            if picture.shape[1::-1] != size:
                picture = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
            writer.write(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
            count += 1
    finally:
        if writer is not None:
            writer.release()
    return count


def _open_writer(temporary: Path, path: Path, fps: float, size: tuple[int, int]) -> cv2.VideoWriter:
    with _quiet():
        writer = cv2.VideoWriter(str(temporary), cv2.VideoWriter.fourcc(*"mp4v"), fps, size)
    if not writer.isOpened():
        try:
            temporary.touch()
        except OSError as error:
            raise VideoError(f"{path} cannot be written ({error.strerror}); expected a folder to write to") from error
        raise VideoError(
            f"{path} cannot be written: this OpenCV has no encoder for MPEG-4 (mp4v); expected one, as in the wheel "
            "that pip install opencv-python-headless brings. Pictures and tables are written without it"
        )
    return writer


def _check_written(temporary: Path, path: Path, count: int) -> None:
    """OpenCV does not say when the disk is full."""
    capture = _open_quietly(temporary)
    found = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if capture.isOpened() else 0
    capture.release()
    if found != count:
        raise VideoError(
            f"{path} was not saved: {found} of {count} frames came back after writing; expected all: is the disk full?"
        )
