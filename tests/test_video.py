"""Videos as input: which frames come out, what happens to broken files, and what is made of the frames."""

import csv
import struct
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from annotation import video
from annotation.frame_options import FrameOptions
from annotation.video import (
    FRAME_COLUMNS,
    Video,
    VideoError,
    extract_frames,
    frame_name,
    frame_rows,
    list_videos,
    play_rate,
    write_time_tables,
    write_video,
)
from dataset_utils import video_frames
from image_io import read_image, write_image

SIZE = (48, 64)  # height, width


def picture(number: int, size=SIZE) -> np.ndarray:
    """RGB: the number as a bar of 7 black or white blocks on a grey ground with a red right half."""
    image = np.full((*size, 3), 90, np.uint8)
    image[:, size[1] // 2 :] = (200, 40, 40)
    for bit in range(7):
        image[8:24, 4 + 8 * bit : 12 + 8 * bit] = 255 if number >> bit & 1 else 0
    return image


def number_of(image: np.ndarray) -> int:
    return sum(int(image[16, 8 + 8 * bit].mean() > 128) << bit for bit in range(7))


def write_clip(path: Path, numbers=range(20), fps=10.0, code="MJPG", size=SIZE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*code), fps, size[::-1])
    assert writer.isOpened()
    for number in numbers:
        writer.write(picture(number, size)[..., ::-1].copy())
    writer.release()
    return path


def numbers(path: Path, **options) -> list[int]:
    with Video(path) as opened:
        return [number_of(frame.image) for frame in opened.frames(FrameOptions(**options))]


@pytest.mark.parametrize(("name", "code"), [("a.avi", "MJPG"), ("a.mp4", "mp4v"), ("a.mkv", "mp4v")])
def test_every_frame_comes_once_in_order_and_in_rgb(tmp_path, name, code):
    path = write_clip(tmp_path / name, range(20), 10.0, code)
    with Video(path) as opened:
        frames = list(opened.frames(FrameOptions()))
        assert opened.declared == 20 and opened.findings() == []
    assert [frame.number for frame in frames] == [number_of(frame.image) for frame in frames] == list(range(20))
    assert np.allclose([frame.seconds for frame in frames], np.arange(20) / 10, atol=0.002)
    red = frames[3].image[40, 50].astype(int)
    assert red[0] > 150 and red[2] < 90


def test_steps_and_frames_for_each_second(tmp_path):
    path = write_clip(tmp_path / "a.avi", range(25), fps=10.0)
    assert numbers(path, step=7) == [0, 7, 14, 21]
    assert numbers(path, step=100) == [0]
    assert numbers(path, fps=2) == [0, 5, 10, 15, 20]
    assert numbers(path, fps=0.5) == [0, 20]
    assert numbers(path, fps=4) == [0, 3, 5, 8, 10, 13, 15, 18, 20, 23]  # the first frame of each quarter of a second
    assert numbers(path, fps=1000) == list(range(25))


@pytest.mark.parametrize(
    "options", [{"step": 0}, {"fps": 0.0}, {"step": 2, "fps": 1.0}, {"skip_similar": -1.0}, {"suffix": ".bmp"}]
)
def test_impossible_options_are_refused(options):
    with pytest.raises(ValueError, match="expected|exclude"):
        FrameOptions(**options)


def test_similar_frames_are_left_out_until_something_changes(tmp_path):
    path = write_clip(tmp_path / "a.avi", [0, 0, 0, 1, 1, 0, 0, 2, 2, 2])
    with Video(path) as opened:
        taken = [frame.number for frame in opened.frames(FrameOptions(skip_similar=4.0))]
    assert taken == [0, 3, 5, 7]
    assert len(numbers(path, skip_similar=255.0)) == 1
    assert len(numbers(path)) == 10


def test_slow_changes_add_up():
    """A frame is compared with the last one taken, not with the one before it."""
    dim = np.full((40, 60, 3), 100, np.uint8)
    spots = [video._spots(dim + np.uint8(step)) for step in range(3)]
    assert video._differ_by(spots[0], spots[1]) == 1 and video._differ_by(spots[0], spots[2]) == 2
    small = dim.copy()
    small[20:22, 30:32] = 255  # an object of a few pixels in a large frame still counts
    assert video._differ_by(spots[0], video._spots(small)) > 4


def test_rotation_tag_is_applied(tmp_path):
    data = bytearray(write_clip(tmp_path / "a.mp4", code="mp4v").read_bytes())
    place = data.find(b"tkhd") + 4 + 40
    data[place : place + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, SIZE[0] << 16, 0, 1 << 30)
    (tmp_path / "turned.mp4").write_bytes(data)
    with Video(tmp_path / "a.mp4") as upright, Video(tmp_path / "turned.mp4") as turned:
        first, other = (next(iter(each.frames(FrameOptions()))).image for each in (upright, turned))
    assert first.shape == (*SIZE, 3) and other.shape == (*SIZE[::-1], 3)
    assert np.abs(np.rot90(first, -1).astype(int) - other).max() < 8


@pytest.mark.parametrize(("name", "code"), [("a.avi", "MJPG"), ("a.mkv", "mp4v")])
def test_a_truncated_video_is_named_and_its_frames_kept(tmp_path, name, code):
    path = write_clip(tmp_path / "whole" / name, range(40), code=code)
    cut = tmp_path / name
    cut.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    got = extract_frames(cut, tmp_path / "frames", FrameOptions())
    assert 15 < len(got.rows) < 30
    assert [number_of(read_image(tmp_path / "frames" / row["file"])) for row in got.rows] == list(range(len(got.rows)))
    assert len(got.findings) == 1
    message = got.findings[0]
    assert str(cut) in message and "40 frames" in message and f"after {len(got.rows)} frames" in message
    assert "cut short" in message and "copy" in message


def test_frames_behind_a_damaged_part_are_kept(tmp_path):
    data = bytearray(write_clip(tmp_path / "a.mp4", range(40), code="mp4v").read_bytes())
    start = data.find(b"mdat") + 4
    middle = start + (data.find(b"moov") - start) // 2
    data[middle : middle + 400] = bytes(400)
    (tmp_path / "b.mp4").write_bytes(data)
    got = extract_frames(tmp_path / "b.mp4", tmp_path / "frames", FrameOptions())
    assert 25 < len(got.rows) < 40
    assert len(got.findings) == 1 and "40 frames" in got.findings[0] and "damaged" in got.findings[0]


@pytest.mark.parametrize("content", [b"", b"no video at all", bytes(5000)])
def test_what_is_no_video_is_named(tmp_path, content, capfd):
    path = tmp_path / "x.mp4"
    path.write_bytes(content)
    with pytest.raises(VideoError, match=r"x\.mp4 cannot be opened as a video.*expected a video that plays"):
        Video(path)
    printed = capfd.readouterr()
    assert printed.err == "" and printed.out == ""


def test_an_mp4_without_its_index_is_named(tmp_path):
    path = write_clip(tmp_path / "a.mp4", code="mp4v")
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(VideoError, match="cut short before its index"):
        Video(path)


def test_videos_are_listed(tmp_path):
    for name in ("b.MP4", "a.avi", ".hidden.mp4", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    assert [path.name for path in list_videos([tmp_path])] == ["a.avi", "b.MP4"]
    assert list_videos([tmp_path / "a.avi", tmp_path / "a.avi"]) == [tmp_path / "a.avi"]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        list_videos([tmp_path / "nowhere"])
    (tmp_path / "B.avi").write_bytes(b"x")
    with pytest.raises(VideoError, match="share the stem"):
        list_videos([tmp_path])
    (tmp_path / "empty").mkdir()
    with pytest.raises(VideoError, match="no video there"):
        list_videos([tmp_path / "empty"])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_command_writes_frames_and_manifest(tmp_path, capsys):
    write_clip(tmp_path / "in" / "a.avi", range(12))
    write_clip(tmp_path / "in" / "b c.avi", range(9), fps=5.0)
    video_frames.main(["-i", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--step", "4", "--decimal", "dot"])
    rows = list(csv.DictReader((tmp_path / "out" / "frames.csv").open(encoding="utf-8"), delimiter=";"))
    assert [(row["video"], row["frame"], float(row["seconds"]), row["file"]) for row in rows] == [
        ("a.avi", "0", 0.0, "a_000000.png"),
        ("a.avi", "4", 0.4, "a_000004.png"),
        ("a.avi", "8", 0.8, "a_000008.png"),
        ("b c.avi", "0", 0.0, "b c_000000.png"),
        ("b c.avi", "4", 0.8, "b c_000004.png"),
        ("b c.avi", "8", 1.6, "b c_000008.png"),
    ]
    assert [number_of(read_image(tmp_path / "out" / row["file"])) for row in rows] == [0, 4, 8, 0, 4, 8]
    assert "6 frames of 2 videos" in capsys.readouterr().out


def test_a_finished_video_is_not_decoded_again_and_lost_frames_come_back(tmp_path, monkeypatch):
    path, out = write_clip(tmp_path / "a.avi"), tmp_path / "out"
    first = extract_frames(path, out, FrameOptions(step=3))
    before = contents(out)
    with monkeypatch.context() as patch:
        patch.setattr(video, "Video", None)
        again = extract_frames(path, out, FrameOptions(step=3))
    assert again.was_done and again.rows == first.rows
    (out / "a_000006.png").unlink()
    assert not extract_frames(path, out, FrameOptions(step=3)).was_done
    assert contents(out) == before


def test_a_killed_run_ends_with_the_same_files(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "a.avi", [0, 1, 1, 2, 3, 3, 3, 4, 5])
    options = FrameOptions(skip_similar=4.0)
    extract_frames(path, tmp_path / "whole", options)
    written = []

    def stop_at_third(target, image):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(target)
        write_image(target, image)

    with monkeypatch.context() as patch:
        patch.setattr(video, "write_image", stop_at_third)
        with pytest.raises(KeyboardInterrupt):
            extract_frames(path, tmp_path / "out", options)
    (tmp_path / "out" / f".{'0' * 32}.tmp").write_bytes(b"half a picture")
    kept = {target: target.stat().st_mtime_ns for target in written}
    extract_frames(path, tmp_path / "out", options)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert {target: target.stat().st_mtime_ns for target in written} == kept


def test_other_flags_another_video_and_foreign_files_are_refused(tmp_path):
    path, out = write_clip(tmp_path / "a.avi"), tmp_path / "out"
    extract_frames(path, out, FrameOptions(step=5))
    before = contents(out)
    with pytest.raises(VideoError, match="other flags.*give another folder"):
        extract_frames(path, out, FrameOptions(step=4))
    write_clip(path, range(5))
    with pytest.raises(VideoError, match="another video of this name"):
        extract_frames(path, out, FrameOptions(step=5))
    assert contents(out) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a_000000.png").write_bytes(b"mine")
    with pytest.raises(VideoError, match="a_000000.png"):
        extract_frames(path, tmp_path / "mine", FrameOptions())
    assert (tmp_path / "mine" / "a_000000.png").read_bytes() == b"mine"


def test_one_bad_video_does_not_stop_the_rest(tmp_path, capsys):
    write_clip(tmp_path / "in" / "b.avi", range(3))
    (tmp_path / "in" / "a.mp4").write_bytes(b"broken")
    with pytest.raises(SystemExit) as error:
        video_frames.main(["-i", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--format", "jpg"])
    assert error.value.code == 1
    assert sorted(path.name for path in (tmp_path / "out").glob("*.*")) == [
        ".frames", *(f"b_{number:06d}.jpg" for number in range(3)), "frames.csv"
    ]  # fmt: skip
    message = capsys.readouterr().err
    assert "1 finding" in message and "a.mp4 cannot be opened" in message


def test_a_kill_of_the_process_is_survived(tmp_path):
    """The process is killed by the system, not by an exception."""
    path = write_clip(tmp_path / "a.avi", range(60), size=(480, 640))
    command = [sys.executable, "-m", "dataset_utils.video_frames", "-i", str(path), "-o"]
    root = Path(video_frames.__file__).resolve().parent.parent
    process = subprocess.Popen([*command, str(tmp_path / "out")], cwd=root, stdout=subprocess.DEVNULL)
    while not (tmp_path / "out" / "a_000002.png").exists():
        assert process.poll() is None
    process.kill()
    process.wait()
    for name in ("out", "whole"):
        extract_frames(path, tmp_path / name, FrameOptions())
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


# ---- over time


def manifest(count=4, name="a.avi"):
    return [
        {"video": name, "frame": 5 * k, "seconds": k / 2, "file": f"{frame_name(Path(name), 5 * k)}.png"}
        for k in range(count)
    ]


def test_objects_are_counted_and_sized_for_each_frame():
    objects = [
        {"image": "a_000005", "area": 10, "equivalent_diameter": 3.0},
        {"image": "a_000005.png", "area": 30, "equivalent_diameter": 6.0},
        {"image": "a_000015", "area": "7", "equivalent_diameter": "2.5"},
        {"image": "other", "area": 1, "equivalent_diameter": 1.0},
    ]
    rows = frame_rows(manifest(), iter(objects))
    assert [row["objects"] for row in rows] == [0, 2, 0, 1]
    assert [row["area"] for row in rows] == [0, 40, 0, 7]
    assert rows[0]["diameter_mean"] is None and rows[1]["diameter_mean"] == 4.5
    assert rows[1]["diameter_sauter"] == pytest.approx((27 + 216) / (9 + 36))
    assert (rows[1]["diameter_p10"], rows[1]["diameter_p90"]) == pytest.approx((3.3, 5.7))
    scaled = frame_rows(manifest(), objects, mm_per_pixel=0.5)
    assert scaled[1]["area"] == 10 and scaled[1]["diameter_mean"] == 2.25
    assert set(rows[0]) == set(FRAME_COLUMNS)


def test_videos_with_dots_in_their_names_keep_their_frames_apart():
    name = "run.1.avi"
    objects = [{"image": "run.1_000005", "area": 4, "equivalent_diameter": 2.0}]
    assert [row["objects"] for row in frame_rows(manifest(3, name), objects)] == [0, 1, 0]


def test_tables_and_curves_are_written(tmp_path):
    frames = [*manifest(60), *manifest(1, "b $x$.avi")]
    objects = [
        {"image": row["file"], "area": 5, "equivalent_diameter": 2.0 + k % 7 + number % 3}
        for number, row in enumerate(frames)
        for k in range(number % 9)
    ]
    rows = frame_rows(frames, objects)
    write_time_tables(tmp_path, rows, decimal="dot", unit="mm")
    table = list(csv.DictReader((tmp_path / "over_time.csv").open(encoding="utf-8"), delimiter=";"))
    assert tuple(table[0]) == FRAME_COLUMNS and len(table) == 61
    assert [int(row["objects"]) for row in table] == [row["objects"] for row in rows]
    curves = read_image(tmp_path / "a_over_time.png")
    blue = (np.abs(curves.astype(int) - (0, 114, 178)).max(axis=2) < 30).sum()
    assert curves.shape[0] > 400 and blue > 500
    assert (tmp_path / "b $x$_over_time.png").is_file()


def test_overlay_video_holds_what_was_drawn(tmp_path):
    path = tmp_path / "sub" / "overlay.mp4"
    drawn = [picture(number, (51, 67)) for number in range(5)]  # odd sides
    drawn[3] = picture(3, (102, 134))
    assert write_video(path, iter(drawn), 12.5) == 5
    assert [each.name for each in path.parent.iterdir()] == ["overlay.mp4"]
    with Video(path) as opened:
        frames = list(opened.frames(FrameOptions()))
        assert opened.fps == pytest.approx(12.5)
    assert [number_of(frame.image) for frame in frames[:3]] == [0, 1, 2]
    assert all(frame.image.shape == (52, 68, 3) for frame in frames)  # 25.5 and 33.5 pairs, rounded
    red = frames[0].image[45, 60].astype(int)
    assert red[0] > 150 and red[2] < 90
    assert write_video(tmp_path / "none.mp4", [], 10) == 0 and not (tmp_path / "none.mp4").exists()


def test_large_overlays_are_reduced(tmp_path):
    write_video(tmp_path / "o.mp4", [np.zeros((1500, 3000, 3), np.uint8)], 5)
    with Video(tmp_path / "o.mp4") as opened:
        assert next(iter(opened.frames(FrameOptions()))).image.shape == (960, 1920, 3)


def test_a_missing_encoder_is_said(tmp_path, monkeypatch):
    class Closed:
        def __init__(self, *_):
            pass

        fourcc = staticmethod(cv2.VideoWriter.fourcc)

        def isOpened(self):  # noqa: N802
            return False

        def release(self):
            pass

    monkeypatch.setattr(cv2, "VideoWriter", Closed)
    with pytest.raises(VideoError, match=r"o\.mp4 cannot be written: this OpenCV has no encoder.*pip install"):
        write_video(tmp_path / "o.mp4", [picture(0)], 5)
    assert list(tmp_path.iterdir()) == []


def test_an_incomplete_overlay_is_not_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(cv2.VideoWriter, "write", lambda *_: None)
    with pytest.raises(VideoError, match="not saved"):
        write_video(tmp_path / "o.mp4", [picture(0)], 5)
    assert list(tmp_path.iterdir()) == []


def test_play_rate_follows_life_within_bounds():
    assert play_rate(manifest()) == 2.0
    assert play_rate([{"seconds": k / 25} for k in range(9)]) == pytest.approx(25)
    assert play_rate([{"seconds": k * 60} for k in range(9)]) == 2.0
    assert play_rate([{"seconds": k / 240} for k in range(9)]) == 60.0
    assert play_rate([{"seconds": 0.0}]) == 2.0
