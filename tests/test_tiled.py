"""Engines window by window: the objects are those of the whole picture, each once, none cut, no seam."""

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile

from annotation import tiled
from annotation.automatic import prepare, sample_windows
from annotation.instances import Instances, empty_instances, gap_mask, number_instances, object_rows
from annotation.stitching import Stitcher, plan_windows
from annotation.tiled import TiledFiles, TileOptions, annotate_tiled, sample_picture
from annotation.watershed import WatershedOptions
from slide_io import open_slide

SIZES = [(1, 1), (1, 200), (200, 1), (64, 64), (96, 160), (100, 131), (193, 65)]


def components(image: np.ndarray) -> Instances:
    """What is brighter than 127, in 4-connected pieces; the score of one follows from its size."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats((image[..., 0] > 127).astype(np.uint8), connectivity=4)
    names = ["bright" if area % 2 else "even" for area in stats[1:, cv2.CC_STAT_AREA].tolist()]
    return number_instances(labels, stats[1:, cv2.CC_STAT_AREA] / 1e4, names)


def watershed(image: np.ndarray) -> Instances:
    """Touching discs parted at their necks."""
    inside = (image[..., 0] > 127).astype(np.uint8)
    padded = cv2.copyMakeBorder(inside, 1, 1, 1, 1, cv2.BORDER_REPLICATE)
    distance = cv2.GaussianBlur(cv2.distanceTransform(padded, cv2.DIST_L2, 5), (0, 0), 1)[1:-1, 1:-1]
    peaks = (distance >= cv2.dilate(distance, np.ones((9, 9), np.uint8))) & (distance > 2)
    count, seeds = cv2.connectedComponents(peaks.astype(np.uint8), connectivity=8)
    if count == 1:
        return empty_instances(*inside.shape)
    depth = 255 - np.clip(distance * 12, 0, 255).astype(np.uint8)
    markers = np.where(inside > 0, seeds, 0).astype(np.int32)
    markers[inside == 0] = count
    labels = cv2.watershed(cv2.cvtColor(depth, cv2.COLOR_GRAY2RGB), markers)
    labels[(labels == count) | (labels < 0)] = 0
    return number_instances(labels, 1.0, "watershed")


def discs(seed: int, size, radius=(2, 9), crowd=60) -> np.ndarray:
    rng = np.random.default_rng(seed)
    image = np.full((*size, 1), 30, np.uint8)
    for _ in range(size[0] * size[1] * crowd // 20000 + 1):
        centre = tuple(int(rng.integers(0, length)) for length in size[::-1])
        cv2.circle(image, centre, int(rng.integers(*radius)), 220, -1)
    return image


def run(tmp_path: Path, image: np.ndarray, engine, options: TileOptions, **how):
    path = tmp_path / "in.tif"
    kind = "rgb" if image.shape[2] == 3 else "minisblack"
    tifffile.imwrite(path, image if image.shape[2] == 3 else image[..., 0], photometric=kind)
    rows: list[dict] = []
    files = TiledFiles(tmp_path / "labels.tif", tmp_path / "mask.tif", tmp_path / "work", **how)
    with open_slide(path) as slide:
        result = annotate_tiled(slide.grid(), engine, options, files, take_rows=rows.extend)
    labels, mask = tifffile.imread(files.labels), tifffile.imread(files.mask)
    labels, mask = labels.reshape(image.shape[:2]), mask.reshape(image.shape[:2])
    assert labels.dtype == np.uint32 and mask.dtype == np.uint8 and not files.work.exists()
    assert result.objects == labels.max() == len(rows) and result.covered == np.count_nonzero(labels)
    assert set(np.unique(mask)) <= {0, 255}
    return labels, mask, rows


def check_rows(rows: list[dict], expected: list[dict]) -> None:
    assert [row["id"] for row in sorted(rows, key=lambda row: row["id"])] == [row["id"] for row in expected]
    for row, other in zip(sorted(rows, key=lambda row: row["id"]), expected, strict=True):
        assert list(row) == list(other)
        for name, value in row.items():
            if name == "ellipse_angle":
                away = abs(value - other[name]) % 180
                assert min(away, 180 - away) < 1e-3 or row["ellipse_major"] - row["ellipse_minor"] < 1e-3
            elif isinstance(value, float):
                assert value == pytest.approx(other[name], rel=1e-5, abs=1e-6), name
            else:
                assert value == other[name], name


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("engine", [components])
def test_small_objects_are_those_of_the_whole_picture(tmp_path, size, engine):
    image = discs(sum(size), size, radius=(1, 5), crowd=30)
    whole = engine(image)
    labels, mask, rows = run(tmp_path, image, engine, TileOptions(32, 32))
    assert np.array_equal(labels, whole.labels)
    assert np.array_equal(mask > 0, labels > 0)
    check_rows(rows, object_rows(whole, image))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("tile", "margin"), [(16, 0), (16, 3), (32, 8), (48, 48), (256, 16)])
def test_objects_of_any_size_stay_one(tmp_path, seed, tile, margin):
    """Rings, combs and blobs larger than windows: components are joined whatever the margin."""
    rng = np.random.default_rng(seed)
    noise = cv2.GaussianBlur(rng.normal(0, 1, (150, 170)).astype(np.float32), (0, 0), 3 + seed)
    image = np.where(noise > 0, 200, 50).astype(np.uint8)[..., None]
    whole = components(image)
    labels, _, rows = run(tmp_path, image, components, TileOptions(tile, margin))
    if margin:
        assert np.array_equal(labels, whole.labels)
        areas = {row["id"]: row["area"] for row in rows}
        assert areas == {row["id"]: row["area"] for row in object_rows(whole, image)}
    else:  # without an overlap nothing says which parts belong together
        assert np.array_equal(labels > 0, image[..., 0] > 127)


def labyrinth(rng: np.random.Generator) -> np.ndarray:
    """Blobs, single pixels or ellipses, in a picture of any size."""
    height, width = (int(side) for side in rng.integers(1, 140, 2))
    image = np.zeros((height, width), np.uint8)
    kind = rng.integers(0, 3)
    if kind == 0:
        noise = cv2.GaussianBlur(rng.normal(0, 1, image.shape).astype(np.float32), (0, 0), rng.uniform(0.5, 6))
        image[noise.reshape(image.shape) > rng.normal(0, 0.02)] = 200
    elif kind == 1:
        image[rng.random(image.shape) > rng.uniform(0.3, 0.7)] = 200
    else:
        for _ in range(6):
            place, axes = (int(rng.integers(width)), int(rng.integers(height))), rng.integers(1, 60, 2).tolist()
            cv2.ellipse(image, place, axes, int(rng.integers(180)), 0, 360, 200, int(rng.choice([-1, 1, 2, 4])))
    return image[..., None]


# Those above 50 have objects that wind in and out of windows so that no two parts share half of their pixels.
@pytest.mark.parametrize("seed", [*range(12), 56, 278, 289, 327, 505, 1167, 1426, 2021])
def test_random_pictures_windows_and_bands(tmp_path, monkeypatch, seed):
    rng = np.random.default_rng(seed)
    image = labyrinth(rng)
    tile = 16 * int(rng.integers(1, 5))
    monkeypatch.setattr(tiled, "BAND_PIXELS", image.shape[1] * int(rng.integers(1, 40)))
    labels, _, rows = run(tmp_path, image, components, TileOptions(tile, int(rng.integers(1, tile + 1))))
    whole = components(image)
    assert np.array_equal(labels, whole.labels)
    expected = object_rows(whole, image)
    for row in (*rows, *expected):
        del row["score"], row["engine"]  # of parts, as windows see them
    check_rows(rows, expected)


@pytest.mark.parametrize("seed", range(6))
def test_touching_discs_are_parted_as_in_the_whole_picture(tmp_path, seed):
    size = [(150, 190), (128, 192), (64, 300)][seed % 3]
    image = discs(seed, size, radius=(4, 8), crowd=40)
    whole = watershed(image)
    labels, _, _ = run(tmp_path, image, watershed, TileOptions(64, 48))
    assert len(whole) > 10
    assert labels.max() == len(whole)
    assert np.array_equal(labels, whole.labels)


def test_a_disc_larger_than_a_tile_and_a_comb_are_one_object_each(tmp_path):
    image = np.zeros((260, 260, 1), np.uint8)
    cv2.circle(image, (90, 90), 80, 255, -1)
    image[200:204, 5:250] = 255
    image[200:250, 5:250:20] = 255
    labels, _, rows = run(tmp_path, image, components, TileOptions(32, 8))
    assert np.array_equal(labels, components(image).labels) and len(rows) == 2


def disagreeing(shift: int):
    """An engine whose borders differ from window to window by up to `shift` pixels."""
    calls = iter(range(10**6))

    def engine(image: np.ndarray) -> Instances:
        found = components(image)
        kernel = np.ones((2 * shift + 1, 2 * shift + 1), np.uint8)
        change = (cv2.erode, cv2.dilate)[next(calls) % 2]
        labels = change(found.labels.astype(np.uint16), kernel).astype(np.int32)
        return number_instances(labels, 0.5, "moody")

    return engine


@pytest.mark.parametrize("seed", range(5))
def test_no_object_is_cut_or_doubled_where_windows_disagree(tmp_path, seed):
    """Discs apart from each other: each is there once, as one window saw it, with no straight edge along a core."""
    rng = np.random.default_rng(seed)
    image = np.zeros((200, 232, 1), np.uint8)
    for row in range(12, 200, 24):
        for column in range(12, 232, 24):
            place = int(column + rng.integers(-3, 4)), int(row + rng.integers(-3, 4))
            cv2.circle(image, place, 7, 255, -1)
    whole = components(image)
    labels, _, _ = run(tmp_path, image, disagreeing(1), TileOptions(48, 32))
    assert labels.max() == len(whole)
    small, large = (change(image[..., 0], np.ones((3, 3), np.uint8)) > 0 for change in (cv2.erode, cv2.dilate))
    assert not (labels > 0)[~large].any() and (labels > 0)[small].all()
    kinds = set()
    for number in range(1, len(whole) + 1):
        around = cv2.dilate((whole.labels == number).astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
        seen, wide, narrow = (each[around] for each in (labels > 0, large, small))
        assert np.array_equal(seen, wide) or np.array_equal(seen, narrow)
        kinds.add(np.array_equal(seen, wide))
    assert kinds == {True, False}


def test_one_window_sees_two_objects_where_another_sees_one(tmp_path):
    """The first window decides; the other's objects do not leave slivers or a cut."""
    calls = iter(range(100))
    image = np.zeros((64, 128, 1), np.uint8)
    image[20:40, 50:78] = 255

    def engine(window: np.ndarray) -> Instances:
        found = components(window)
        if next(calls) == 1:
            labels = found.labels.copy()
            labels[:, 64 - 16 :] *= 2  # parted at the picture's column 64 + 0, where the core begins
            return number_instances(labels, [0.9, 0.9], ["x", "x"])
        return found

    labels, _, rows = run(tmp_path, image, engine, TileOptions(64, 16))
    assert len(rows) == 1 and np.array_equal(labels > 0, image[..., 0] > 0)


def test_scores_and_engines_follow_the_largest_part(tmp_path):
    image = np.zeros((40, 100, 1), np.uint8)
    image[10:30, 10:95] = 255
    image[35, 3] = 255

    def engine(window: np.ndarray) -> Instances:
        found = components(window)
        return Instances(found.labels, np.full(len(found), window.shape[1] / 100, np.float32), found.engines)

    _, _, rows = run(tmp_path, image, engine, TileOptions(64, 8))
    assert len(rows) == 2
    assert {row["id"]: row["score"] for row in rows} == pytest.approx({1: 0.72, 2: 0.72})
    large = next(row for row in rows if row["id"] == 1)
    assert large["area"] == 1700


@pytest.mark.parametrize("gap", [0, 1, 2, 3])
def test_the_mask_parts_touching_objects_as_in_memory(tmp_path, gap, monkeypatch):
    image = discs(3, (150, 190), radius=(5, 9), crowd=60)
    monkeypatch.setattr(tiled, "BAND_PIXELS", 190 * 7)
    labels, mask, _ = run(tmp_path, image, watershed, TileOptions(64, 48), gap=gap)
    expected = gap_mask(labels.astype(np.int32), gap)
    assert np.count_nonzero(mask != expected) <= 0.002 * mask.size  # pieces that a gap cuts off stay here
    if gap:
        count, pieces = cv2.connectedComponents(mask, connectivity=8)
        for piece in range(1, count):
            assert len(np.unique(labels[pieces == piece])) == 1


@pytest.mark.parametrize("workers", [2, 3])
def test_threads_do_not_change_the_result(tmp_path, workers):
    image = discs(5, (130, 150))
    one, _, _ = run(tmp_path, image, components, TileOptions(32, 16))
    several, _, _ = run(tmp_path, image, components, TileOptions(32, 16, workers))
    assert np.array_equal(one, several)


def test_an_error_of_the_engine_comes_through_and_leaves_earlier_results(tmp_path):
    image = discs(5, (130, 150))
    before, _, _ = run(tmp_path, image, components, TileOptions(32, 16))
    data = (tmp_path / "labels.tif").read_bytes()

    def broken(window: np.ndarray) -> Instances:
        raise RuntimeError("out of memory")

    for workers in (1, 2):
        with pytest.raises(RuntimeError, match="out of memory"):
            run(tmp_path, image, broken, TileOptions(32, 16, workers))
    with pytest.raises(ValueError, match="expected the same size"):
        run(tmp_path, image, lambda window: empty_instances(3, 3), TileOptions(32, 16))
    assert (tmp_path / "labels.tif").read_bytes() == data
    again, _, _ = run(tmp_path, image, components, TileOptions(32, 16))  # what was left in work/ does no harm
    assert np.array_equal(before, again)


@pytest.mark.parametrize("stop", [0, 3, 6, 11, 17, 21])
@pytest.mark.parametrize("late", [False, True])
def test_a_killed_run_goes_on_with_the_row_in_work(tmp_path, monkeypatch, stop, late):
    """Kills between windows, and between the rows that are safe and the note about them."""
    image = np.where(cv2.GaussianBlur(discs(7, (1300, 200), (5, 40), 20), (0, 0), 3) > 100, 220, 30).astype(np.uint8)
    image = image.reshape(1300, 200, 1)
    options, whole = TileOptions(128, 32), components(image)  # 11 rows of 2 windows
    path = tmp_path / "in.tif"
    tifffile.imwrite(path, image[..., 0])
    files = TiledFiles(tmp_path / "labels.tif", tmp_path / "mask.tif", tmp_path / "work")
    calls = []

    def engine(window: np.ndarray) -> Instances:
        calls.append(window.shape)
        if len(calls) == stop + 1 and not late:
            raise KeyboardInterrupt
        return components(window)

    written = tiled.atomic_write

    def stopping(target):
        if late and len(calls) > stop:
            raise KeyboardInterrupt
        return written(target)

    def annotate():
        with open_slide(path) as slide:
            return annotate_tiled(slide.grid(), engine, options, files, digest="a")

    with monkeypatch.context() as patch:
        patch.setattr(tiled, "atomic_write", stopping)
        with pytest.raises(KeyboardInterrupt):
            annotate()
    before, safe_rows = len(calls), stop // 2
    stop = 10**6
    result = annotate()
    assert result.objects == len(whole)
    assert np.array_equal(tifffile.imread(files.labels), whole.labels)
    assert len(calls) - before == 22 - 2 * safe_rows


def test_a_digest_of_something_else_begins_anew(tmp_path):
    first, second = discs(1, (600, 80)), discs(2, (600, 80))
    calls = []

    def engine(window: np.ndarray) -> Instances:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return components(window)

    files = TiledFiles(tmp_path / "labels.tif", tmp_path / "mask.tif", tmp_path / "work")
    for name, image in (("first", first), ("second", second)):
        tifffile.imwrite(tmp_path / f"{name}.tif", image[..., 0])
        with open_slide(tmp_path / f"{name}.tif") as slide:
            how = slide.grid(), engine, TileOptions(64, 16), files
            if name == "first":
                with pytest.raises(KeyboardInterrupt):
                    annotate_tiled(*how, digest=name)
                (files.work / "draft" / "state.npz").write_bytes(b"damaged")
            else:
                annotate_tiled(*how, digest=name)
    assert np.array_equal(tifffile.imread(files.labels), components(second).labels)


def test_files_of_others_in_the_working_folder_stay(tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "mine.txt").write_text("mine")
    tifffile.imwrite(tmp_path / "in.tif", discs(1, (60, 80))[..., 0])
    files = TiledFiles(tmp_path / "labels.tif", tmp_path / "mask.tif", tmp_path / "work")
    with open_slide(tmp_path / "in.tif") as slide:
        annotate_tiled(slide.grid(), components, TileOptions(32, 16), files, digest="a")
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["mine.txt"]


def test_pixels_without_data_hold_no_object(tmp_path):
    image = np.full((100, 120), 200, np.uint8)
    image[:, 40:60] = 7
    path = tmp_path / "in.tif"
    tifffile.imwrite(path, image, extratags=[(42113, "s", 2, "7", True)])
    files = TiledFiles(tmp_path / "labels.tif", tmp_path / "mask.tif", tmp_path / "work")
    with open_slide(path) as slide:
        bright = lambda window: components(255 - window)  # noqa: E731 - nodata reads as 0
        result = annotate_tiled(slide.grid(), bright, TileOptions(32, 16), files)
    assert result.objects == 0 and not tifffile.imread(files.mask).any()


def test_a_sample_shows_the_objects(tmp_path):
    image = np.full((4000, 5000), 240, np.uint8)
    image[3200:3700, 700:1500] = np.random.default_rng(0).integers(0, 255, (500, 800))
    tifffile.imwrite(tmp_path / "in.tif", image, tile=(256, 256))
    with open_slide(tmp_path / "in.tif") as slide:
        sample = sample_picture(slide.grid())
        assert sample.shape == (1536, 1536, 1) and 0.05 < (sample < 200).mean() < 0.4
    tifffile.imwrite(tmp_path / "thin.tif", np.arange(3_000_000, dtype=np.uint32).astype(np.uint8)[:, None])
    with open_slide(tmp_path / "thin.tif") as slide:
        assert sample_picture(slide.grid()).shape == (1536, 3, 1)
    tifffile.imwrite(tmp_path / "small.tif", image[:50, :60])
    with open_slide(tmp_path / "small.tif") as slide:
        assert np.array_equal(sample_picture(slide.grid())[..., 0], image[:50, :60])


def nine_windows(image):
    """The windows of a large picture that lie evenly, set together, pixel by pixel: written down a second time."""
    rows, columns = ([start + k for start in (0, (n - 512) // 2, n - 512) for k in range(512)] for n in image.shape[:2])
    return image[rows][:, columns]


@pytest.mark.parametrize("shape", [(1700, 1901, 3), (1536, 1600, 1), (3001, 1999, 1)])
def test_pictures_are_judged_alike_in_windows_and_whole(tmp_path, shape):
    rng = np.random.default_rng(5)
    strength = np.linspace(20, 60, shape[1])[None, :, None]  # the right side has three times the contrast of the left
    image = np.clip(120 + strength * rng.normal(0, 1, shape), 0, 255).astype(np.uint8)
    tifffile.imwrite(tmp_path / "in.tif", image.squeeze(), photometric="rgb" if shape[2] == 3 else "minisblack")
    with open_slide(tmp_path / "in.tif") as slide:
        sample = sample_picture(slide.grid())
    assert np.array_equal(sample, nine_windows(image))
    _, whole = prepare(image, WatershedOptions(), only_options=True)
    _, chosen = prepare(sample, WatershedOptions(), only_options=True)
    areas = [replace(options, max_area=0) for options in (whole, chosen)]  # without a limit it is the whole picture
    assert areas[0] == areas[1]


@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_empty_windows_make_way_for_the_nearest_that_are_not(kind):
    """Textured but for one corner; the windows that may stand in are those at sixths of the way."""
    rng = np.random.default_rng(6)
    image = rng.integers(0, 200, (3584, 3584, 1)).astype(kind)
    image[:1024, :1024] = 230 + rng.integers(0, 3, (1024, 1024, 1))
    if kind is np.float32:
        image[5::7, ::11] = np.nan
    sample = sample_windows(3584, 3584, lambda y, x, height, width: image[y : y + height, x : x + width])
    expected = nine_windows(image)
    expected[:512, :512] = image[:512, 1024:1536]  # as near as the one below it, and before it in reading order
    assert np.array_equal(sample, expected, equal_nan=kind is np.float32)


def test_windows_stay_empty_where_there_are_no_others():
    image = np.full((3000, 3000, 1), 230, np.uint8)
    read = lambda y, x, height, width: image[y : y + height, x : x + width]  # noqa: E731
    assert (sample_windows(3000, 3000, read) == 230).all()
    image[600:800, 600:800] = 10  # in one of the 49 places alone
    sample = sample_windows(3000, 3000, read)
    assert np.array_equal(sample[:512, :512], image[414:926, 414:926])
    assert (sample == 10).sum() == (image[414:926, 414:926] == 10).sum()


@pytest.mark.parametrize("shape", [(3_000_000, 1, 1), (2, 1_500_000, 1)])
def test_thin_pictures_have_a_sample(shape):
    assert prepare(np.zeros(shape, np.uint8), WatershedOptions(), only_options=True)[1].size


@pytest.mark.parametrize("bad", [{"tile": 24}, {"tile": 0}, {"tile": 32, "margin": 33}, {"workers": 0}])
def test_impossible_tiles_are_refused(bad):
    with pytest.raises(ValueError, match="expected a multiple of 16"):
        TileOptions(**bad)


def test_windows_part_the_picture():
    covered = np.zeros((70, 101), int)
    for row in plan_windows(70, 101, 32, 8):
        for window in row:
            top, left, bottom, right = window.core
            covered[top:bottom, left:right] += 1
            assert window.box == (max(0, top - 8), max(0, left - 8), min(70, bottom + 8), min(101, right + 8))
    assert (covered == 1).all()


def test_memory_of_the_canvas_does_not_follow_the_height():
    assert Stitcher(10**6, 50, 64, 16).canvas.shape == (96, 50)
