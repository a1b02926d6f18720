"""predict.py on videos and cameras: frames are predicted as pictures are, runs go on, and what is wrong is named."""

import csv
import json
import os
import signal
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from tiny_runs import blobs, write_checkpoint

import predict
import video_prediction
import video_results
from annotation import video
from annotation.frame_options import FrameOptions
from annotation.video import Video, VideoError
from checkpoint import Geometry
from image_io import read_image, read_mask, write_image
from video_prediction import find_clips, stop_on_interrupt
from video_results import Animation

SIZE = (48, 60)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_checkpoint(folder / "best.pth")
    return folder


def write_clip(path: Path, count=6, size=SIZE, fps=10.0, code="MJPG") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*code), fps, size[::-1])
    assert writer.isOpened()
    for number in range(count):
        writer.write(blobs(*size, seed=number)[..., ::-1].copy())
    writer.release()
    return path


def words(run, inputs, out, *more):
    found = ["-cd", run, "-i", *([inputs] if isinstance(inputs, (str, Path)) else inputs), "-o", out]
    return [str(word) for word in (*found, "--backend", "torch", "--cpu", "--thumbnails", 0, *more)]


def go(run, inputs, out, *more):
    predict.main(words(run, inputs, out, *more))
    return out


def stopped(code, capsys, *flags):
    with pytest.raises(SystemExit) as stop:
        predict.main(list(flags))
    captured = capsys.readouterr()
    assert stop.value.code == code, captured
    assert "Traceback" not in captured.err
    return captured.err


def stems(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open(encoding="utf-8"), delimiter=";"))


def content(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "predict.jsonl"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def frames_as_pictures(path: Path, folder: Path) -> Path:
    with Video(path) as opened:
        for frame in opened.frames(FrameOptions()):
            write_image(folder / f"{path.stem}_{frame.number:06d}.png", frame.image)
    return folder


@pytest.mark.parametrize(
    ("size", "network", "more"),
    [
        (SIZE, {}, []),
        ((1, 2), {}, ["--batch", "3"]),  # sides of next to nothing
        ((90, 150), {}, ["--tta", "flips"]),  # several tiles
        (SIZE, {"classes": 4}, ["--min-area", "9"]),
        (SIZE, {"geometry": Geometry("resize", (32, 32))}, ["--batch", "4"]),
        ((70, 90), {}, ["--reduce", "2", "--full-size"]),
        (SIZE, {"preprocess": ("clahe",)}, []),
    ],
    ids=["one-tile", "tiny", "tiles", "classes", "resize", "reduced", "preprocess"],
)
def test_a_frame_is_predicted_as_a_picture_of_it_is(tmp_path, size, network, more):
    write_checkpoint(tmp_path / "run" / "best.pth", **network)
    path = write_clip(tmp_path / "a.avi", 5, (max(size[0], 16), max(size[1], 16)))
    if min(size) < 16:  # codecs have a smallest size; frames do not
        write_images = [blobs(*size, seed=number) for number in range(5)]
        frames = [video.Frame(k, k / 10, image) for k, image in enumerate(write_images)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Video, "frames", lambda self, options: iter(frames))
            go(tmp_path / "run", path, tmp_path / "out", "--save", "mask,labels,prob", *more, "--max-frames", "5")
        for frame in frames:
            write_image(tmp_path / "pictures" / f"a_{frame.number:06d}.png", frame.image)
    else:
        go(tmp_path / "run", path, tmp_path / "out", "--save", "mask,labels,prob", *more)
        frames_as_pictures(path, tmp_path / "pictures")
    go(tmp_path / "run", tmp_path / "pictures", tmp_path / "expected", "--save", "mask,labels,prob", *more)
    assert stems(tmp_path / "out" / "masks") == [f"a_{number:06d}.png" for number in range(5)]
    different = 0
    for name in stems(tmp_path / "expected" / "masks"):
        one, other = (read_mask(tmp_path / each / "masks" / name) for each in ("out", "expected"))
        assert one.shape == other.shape and one.dtype == other.dtype
        different += np.count_nonzero(one != other) / one.size
    assert different < 0.002
    for name in stems(tmp_path / "expected" / "raw"):
        one, other = (read_image(tmp_path / each / "raw" / name).astype(float) for each in ("out", "expected"))
        assert np.abs(one - other).max() <= (700 if "--reduce" in more else 3)  # of 65535; windows are averaged apart
    rows = table(tmp_path / "out" / "over_time" / "a.csv")
    assert [row["image"] for row in rows] == [f"a_{number:06d}" for number in range(5)]
    for row in rows:
        mask = read_mask(tmp_path / "out" / "masks" / f"{row['image']}.png")
        shares = [float(value.replace(",", ".")) for key, value in row.items() if key.startswith("share_")]
        assert sum(shares) == pytest.approx((mask > 0).mean(), abs=2e-3)
        labels = read_mask(tmp_path / "out" / "labels" / f"{row['image']}.png")
        assert sum(int(value) for key, value in row.items() if key.startswith("objects_")) == labels.max()


def test_what_is_printed_and_which_frames_are_taken(run, tmp_path, capsys):
    path = write_clip(tmp_path / "a.mp4", 20, code="mp4v")
    go(run, path, tmp_path / "out", "--step", "7", "--decimal", "dot", "--batch", "2")
    printed = capsys.readouterr().out
    assert "a: 3 frames; 3 in " in printed and " frames/s; p50 / p95 of a frame: decode " in printed
    assert " network " in printed and " write " in printed and "batches of 2" in printed
    rows = table(tmp_path / "out" / "over_time" / "a.csv")
    assert [(int(row["frame"]), float(row["seconds"])) for row in rows] == [(0, 0), (7, 0.7), (14, 1.4)]
    record = [json.loads(line) for line in (tmp_path / "out" / "predict.jsonl").read_text().splitlines()][-1]
    assert record["frames"] == 3 and record["frames_per_second"] > 0
    assert set(record["latency_ms"]) == {"decode", "network", "write"}
    assert all(0 < low <= high for low, high in record["latency_ms"].values())
    go(run, path, tmp_path / "two", "--fps", "1", "--max-frames", "1")
    assert stems(tmp_path / "two" / "masks") == ["a_000000.png"]


def test_overlay_video_and_animation(run, tmp_path):
    path = write_clip(tmp_path / "a.avi", 12, fps=20.0)
    out = go(run, path, tmp_path / "out", "--save", "video,gif,overlay", "--step", "2")
    assert stems(out / "videos") == ["a.mp4"] and stems(out / "gifs") == ["a.gif"]
    assert not (out / "masks").exists()
    with Video(out / "videos" / "a.mp4") as opened:
        shown = [frame.image for frame in opened.frames(FrameOptions())]
        assert opened.fps == pytest.approx(10)
    drawn = [read_image(each) for each in sorted((out / "overlays").iterdir())]
    assert len(shown) == len(drawn) == 6
    for place, one in enumerate(shown):  # a codec blurs, but each is nearest to its own picture
        far = [np.abs(one.astype(float) - other).mean() for other in drawn]
        assert np.argmin(far) == place and far[place] < 30 < sorted(far)[1]
    with Image.open(out / "gifs" / "a.gif") as gif:
        assert (gif.n_frames, gif.size, gif.info["duration"]) == (6, SIZE[::-1], 100)


def test_an_animation_is_bounded(tmp_path):
    kept = Animation()
    count = 2 * video_results.GIF_FRAMES + 7
    pictures = [np.full((30, 960, 3), number % 256, np.uint8) for number in range(count)]
    assert sum(1 for _ in kept.collect(iter(pictures))) == count
    kept.write(tmp_path / "a.gif", 25)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.size == (480, 15) and gif.n_frames <= video_results.GIF_FRAMES
        assert gif.info["duration"] == 160  # every fourth of 25 in a second
        values = []
        for place in range(3):
            gif.seek(place)
            values.append(int(np.array(gif.convert("RGB"))[5, 5, 0]))
    assert values == [0, 4, 8]


def test_without_an_encoder_the_rest_is_done(run, tmp_path, monkeypatch, capsys):
    path = write_clip(tmp_path / "a.avi", 5)

    def refuse(*_):
        raise VideoError("a.mp4 cannot be written: no encoder")

    monkeypatch.setattr(video, "_open_writer", refuse)
    error = stopped(1, capsys, *words(run, path, tmp_path / "out", "--save", "mask,video,gif"))
    assert "no encoder" in error
    assert len(stems(tmp_path / "out" / "masks")) == 5 and stems(tmp_path / "out" / "gifs") == ["a.gif"]
    with Image.open(tmp_path / "out" / "gifs" / "a.gif") as gif:
        assert gif.n_frames == 5


# ---- again, and in the way


def test_finished_videos_are_not_predicted_again(run, tmp_path, capsys, monkeypatch):
    path = write_clip(tmp_path / "in" / "a.avi")
    write_image(tmp_path / "in" / "b.png", blobs(40, 40))
    out = go(run, tmp_path / "in", tmp_path / "out")
    before = content(out)
    with monkeypatch.context() as patch:
        patch.setattr(video_prediction, "predict_video", None)
        capsys.readouterr()
        go(run, tmp_path / "in", out)
    printed = capsys.readouterr().out
    assert "a: already done" in printed and "b: already done" in printed
    (out / "masks" / "a_000003.png").unlink()
    go(run, tmp_path / "in", out)
    assert content(out) == before
    go(run, path, out, "--save", "video")
    printed = capsys.readouterr().out
    assert "table there, video missing" in printed
    assert set(content(out)) == {*before, "videos/a.mp4"}


def test_results_of_others_are_in_the_way(run, tmp_path, capsys):
    path = write_clip(tmp_path / "a.avi")
    mine = write_image(tmp_path / "out" / "masks" / "a_000002.png", blobs(5, 5))
    assert mine is None
    before = content(tmp_path / "out")
    error = stopped(1, capsys, *words(run, path, tmp_path / "out"))
    assert "a_000002.png" in error and "in the way" in error and "--overwrite" in error
    assert content(tmp_path / "out") == before
    go(run, path, tmp_path / "out", "--overwrite")
    error = stopped(1, capsys, *words(run, path, tmp_path / "out", "--step", "2"))
    assert "7 results of other flags or files are in the way" in error
    go(run, path, tmp_path / "out", "--step", "2", "--overwrite")
    assert stems(tmp_path / "out" / "masks") == ["a_000000.png", "a_000002.png", "a_000004.png"]


def test_a_picture_beside_frames_of_its_name_is_not_touched(run, tmp_path):
    """Frames of a are a_000000 on; a_1 and a_000000b belong to others."""
    path = write_clip(tmp_path / "a.avi", 2)
    for name in ("a_1", "a_000000b", "ab_000000"):
        write_image(tmp_path / "out" / "masks" / f"{name}.png", blobs(5, 5))
    go(run, path, tmp_path / "out")
    assert len(stems(tmp_path / "out" / "masks")) == 5


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kinds", ["mask,labels", "mask,video"])
def test_a_killed_run_ends_with_the_same_files(run, tmp_path, kinds, capsys):
    path, keeps = write_clip(tmp_path / "a.avi", 8), "video" not in kinds
    go(run, path, tmp_path / "whole", "--save", kinds)
    number = os.fork()
    if number == 0:
        write, seen = video_results.write_frame, []

        def counted(*args, **keywords):
            seen.append(1)
            if len(seen) == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            return write(*args, **keywords)

        video_results.write_frame = counted
        go(run, path, tmp_path / "out", "--save", kinds)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) == -signal.SIGKILL
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "masks").glob("a_*.png")}
    assert 3 <= len(kept) <= 5  # several are written at a time
    noted = len(Path(tmp_path / "out" / ".a.partial" / "frames.jsonl").read_text().splitlines()) - 1 if keeps else 0
    capsys.readouterr()
    go(run, path, tmp_path / "out", "--save", kinds)
    printed = capsys.readouterr().out
    again = {name for name in kept if (tmp_path / "out" / "masks" / name).stat().st_mtime_ns != kept[name]}
    if keeps:
        assert noted >= 1 and len(again) == len(kept) - noted
        assert f"a: 8 frames, {noted} of them done before; {8 - noted} in" in printed
    else:
        assert again == set(kept) and "a: 8 frames; 8 in" in printed
    half = list((tmp_path / "out").rglob(".*.tmp"))  # half a file, which an hour later is deleted
    for left in half:
        os.utime(left, (0, 0))
    go(run, path, tmp_path / "out", "--save", kinds)
    out, whole = content(tmp_path / "out"), content(tmp_path / "whole")
    assert out.keys() == whole.keys()
    assert {name for name in out if out[name] != whole[name]} <= {"videos/a.mp4"}  # it holds the time it was made at
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


# ---- bad input


def test_one_bad_video_does_not_stop_the_rest(run, tmp_path, capsys):
    write_clip(tmp_path / "in" / "b.avi", 3)
    (tmp_path / "in" / "a.mp4").write_bytes(b"broken")
    cut = write_clip(tmp_path / "c.avi", 30)
    (tmp_path / "in" / "c.avi").write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    error = stopped(1, capsys, *words(run, tmp_path / "in", tmp_path / "out"))
    assert "2 findings" in error and "a.mp4 cannot be opened as a video" in error
    assert "c.avi ends after" in error and "30 frames" in error
    names = stems(tmp_path / "out" / "masks")
    assert [name for name in names if name[0] == "b"] == [f"b_{number:06d}.png" for number in range(3)]
    assert 5 < sum(name[0] == "c" for name in names) < 25
    assert stems(tmp_path / "out" / "over_time") == ["b.csv", "c.csv"]


def test_names_that_would_collide_are_refused(run, tmp_path, capsys):
    write_clip(tmp_path / "in" / "a.avi", 2)
    write_image(tmp_path / "in" / "a_000001.png", blobs(20, 20))
    assert "both write results named 'a_000001'" in stopped(2, capsys, *words(run, tmp_path / "in", tmp_path / "out"))
    (tmp_path / "in" / "a_000001.png").rename(tmp_path / "in" / "a.png")
    assert "both write results named 'a'" in stopped(2, capsys, *words(run, tmp_path / "in", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_flags_that_do_not_fit_are_refused(run, tmp_path, capsys):
    clip = write_clip(tmp_path / "a.avi", 2)
    write_image(tmp_path / "b.png", blobs(20, 20))
    for inputs, more, said in [
        ([tmp_path / "b.png"], ["--save", "video"], "is for videos"),
        ([tmp_path / "b.png"], ["--save", "mask,gif"], "no video"),
        ([clip, tmp_path / "b.png"], ["--save", "video,gif"], "such as mask"),
        ([clip], ["--mpp", "0.5"], "--mpp: not for videos"),
        ([clip], ["--format", "ome"], "--format ome: not for videos"),
        ([clip], ["--tissue", "otsu"], "--tissue otsu: not for videos"),
        ([clip], ["--step", "2", "--fps", "3"], "not allowed with"),
    ]:
        assert said in stopped(2, capsys, *words(run, inputs, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_a_network_of_other_channels_is_named(tmp_path, capsys):
    five = tuple(map(str, range(5)))
    write_checkpoint(tmp_path / "run" / "best.pth", channels=five, mean=(120.0,) * 5, std=(40.0,) * 5)
    clip = write_clip(tmp_path / "a.avi", 2)
    error = stopped(1, capsys, *words(tmp_path / "run", clip, tmp_path / "out"))
    assert "a.avi: the network takes 5 channels" in error and "frames of videos have 3" in error


def test_a_grey_network_sees_grey_frames(tmp_path):
    write_checkpoint(tmp_path / "run" / "best.pth", channels=("grey",), mean=(120.0,), std=(40.0,))
    clip = write_clip(tmp_path / "a.avi", 2)
    out = go(tmp_path / "run", clip, tmp_path / "out")
    assert len(stems(out / "masks")) == 2


def test_tensorboard_shows_shares_over_time_and_frames_spread_over_the_video(run, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    go(
        run,
        write_clip(tmp_path / "a.avi", 12),
        tmp_path / "out",
        "--thumbnails",
        "3",
        "-log",
        "logs",
        "--save",
        "labels",
    )
    (folder,) = (tmp_path / "logs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    with (tmp_path / "out/over_time/a.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter=";"))
    (name,) = (key.removeprefix("share_") for key in rows[0] if key.startswith("share_") and key != "share_background")
    shown = events.Scalars(f"a share/{name}")
    assert [each.step for each in shown] == [int(row["frame"]) for row in rows] == [*range(12)]
    shares = [float(row[f"share_{name}"].replace(",", ".")) for row in rows]
    assert [each.value for each in shown] == pytest.approx(shares, abs=1e-4) and max(shares) > 0
    assert [each.step for each in events.Images("predict/a")] == [0, 4, 8]
    assert len(events.Scalars(f"a objects/{name}")) == 12


def test_the_estimate_of_disk_is_near_what_is_written(run, tmp_path, monkeypatch):
    told, estimate = [], video_prediction.clip_disk
    monkeypatch.setattr(video_prediction, "clip_disk", lambda *args: told.append(estimate(*args)) or told[-1])
    clip = write_clip(tmp_path / "a.avi", 6, (120, 160))
    go(run, clip, tmp_path / "out", "--dry-run", "--save", "mask,prob")
    go(run, clip, tmp_path / "out", "--save", "mask,prob")
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("[mr]a*/*.png"))
    ((likely, most),) = told
    assert written <= most and likely / 4 <= written <= 4 * likely


def test_dry_run_predicts_nothing(run, tmp_path, capsys):
    clip = write_clip(tmp_path / "a.avi", 20, (90, 150))
    go(run, clip, tmp_path / "out", "--dry-run", "--step", "2")
    printed = capsys.readouterr().out
    assert "90x150" in printed and "10 frames" in printed and "1 video" in printed
    assert not (tmp_path / "out").exists()


# ---- cameras


def test_a_number_is_a_camera_unless_a_file_is_called_so(tmp_path):
    (tmp_path / "7").write_bytes(b"")
    clips, words = find_clips(["0", "7", "0", "a.png"])
    assert [(clip.name, clip.camera) for clip in clips] == [("camera_0", 0)] and words == ["7", "a.png"]


def test_a_camera_is_predicted_until_it_ends(run, tmp_path, monkeypatch, capsys):
    clip = write_clip(tmp_path / "a.avi", 9)
    monkeypatch.setattr(video, "_open_camera", lambda number: cv2.VideoCapture(str(clip)))
    go(run, "0", tmp_path / "out", "--save", "mask,video", "--max-frames", "4", "--batch", "3")
    assert stems(tmp_path / "out" / "masks") == [f"camera_0_{number:06d}.png" for number in range(4)]
    assert stems(tmp_path / "out" / "videos") == ["camera_0.mp4"]
    assert "camera_0: 4 frames" in capsys.readouterr().out
    assert "in the way" in stopped(1, capsys, *words(run, "0", tmp_path / "out"))  # it is not the same recording


def test_an_absent_camera_is_named(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(video, "_open_camera", lambda number: cv2.VideoCapture(str(tmp_path / "none.avi")))
    assert "camera 3 cannot be opened" in stopped(1, capsys, *words(run, "3", tmp_path / "out"))
    assert stems(tmp_path / "out") == ["predict.json"]


def test_ctrl_c_ends_a_recording_well(run, tmp_path, monkeypatch, capsys):
    clip = write_clip(tmp_path / "a.avi", 40)
    monkeypatch.setattr(video, "_open_camera", lambda number: cv2.VideoCapture(str(clip)))
    write, seen = video_results.write_frame, []

    def counted(*args, **keywords):
        seen.append(1)
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return write(*args, **keywords)

    monkeypatch.setattr(video_results, "write_frame", counted)
    go(run, "0", tmp_path / "out", "--save", "mask,video")
    count = len(stems(tmp_path / "out" / "masks"))
    assert 3 <= count < 20 and f"camera_0: {count} frames" in capsys.readouterr().out
    with Video(tmp_path / "out" / "videos" / "camera_0.mp4") as opened:
        assert opened.declared == count


def test_the_second_ctrl_c_interrupts():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), stop_on_interrupt(enabled=True) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.wait(1)
        os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait(1)
    assert signal.getsignal(signal.SIGINT) == before
