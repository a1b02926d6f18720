"""Scores of slides whose objects are filtered: those of the whole prediction, in the memory of a few bands."""

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from discs import write_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from slides import draw_slide, write_mask_tiff, write_slide
from tiny_runs import write_checkpoint

import predict
import results
import slide_sources
import validate
from backends import load_forward
from checkpoint import Geometry
from classes import ClassMap
from image_io import IGNORE_INDEX, read_mask, write_mask
from losses import build_loss
from metrics import Scorer
from outputs import decide
from pairing import Pair
from postprocess import Filters, filter_mask
from predictor import Plan
from slide_scoring import Filtering, SlidePrediction, columns_read, pair_rows, predict_slide, score_slide
from slide_writer import Layer, open_job
from tiling import plan_axis

NAMES = ("background", "one", "two", "three")
CASES = (
    Filters(min_area=30),
    Filters(closing=3, fill_holes=-1),
    Filters(fill_holes=9, relative_area=1.5, keep_largest=True),
    Filters(min_length=8),
)


def smooth(rng, planes: int, height: int, width: int) -> np.ndarray:
    """Probabilities (planes, height, width) float32 with objects of a few pixels to some hundred."""
    import cv2

    noise = rng.normal(size=(planes, height, width)).astype(np.float32)
    values = np.stack([cv2.GaussianBlur(plane, (0, 0), 2.5) * 9 for plane in noise])
    return 1 / (1 + np.exp(-values)) if planes == 1 else np.exp(values) / np.exp(values).sum(axis=0)


def in_bands(folder: Path, filters: Filters, size: tuple[int, int], bands) -> SlidePrediction:
    """What predict_slide yields, from bands of one's own."""
    config = SimpleNamespace(geometry=SimpleNamespace(tile=64))
    picture = SimpleNamespace(height=size[0], width=size[1], configs=[config], pixels=lambda *box: np.zeros(box[2:]))
    return SlidePrediction(Pair("s", Path("s.svs"), Path("s.tif")), picture, None, bands, Filtering(filters, folder))


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(CASES), st.sampled_from([2, 4]), st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_filtered_counts_are_those_of_the_whole(tmp_path_factory, seed, filters, num_classes, threshold):
    rng = np.random.default_rng(seed)
    folder, height, binary = tmp_path_factory.mktemp("a") / "waiting", int(rng.integers(1, 1300)), num_classes == 2
    probs = smooth(rng, 1 if binary else num_classes, height, 40)
    mask = decide(smooth(rng, 1 if binary else num_classes, height, 40))
    mask[rng.random(mask.shape) < 0.1] = IGNORE_INDEX
    cuts = sorted({0, height, *rng.integers(0, height, 9).tolist()})
    bands = ((a, probs[:, a:b].copy(), mask[a:b].copy()) for a, b in zip(cuts, cuts[1:], strict=False))
    whole, parts = (Scorer(NAMES[:num_classes], binary=binary, threshold=threshold) for _ in range(2))
    for scorer in (whole, parts):
        scorer.update("before", probs, mask)
    loss = build_loss("ce", num_logits=len(probs))

    pred = filter_mask(decide(probs, threshold), filters)
    expected = whole.update("s", probs, mask, pred)
    found = score_slide(in_bands(folder, filters, mask.shape, bands), parts, loss=loss, show=True)

    assert found.scores == expected and parts.rows() == whole.rows() and parts.summary() == whole.summary()
    np.testing.assert_array_equal(parts.confusion, whole.confusion)
    np.testing.assert_array_equal(parts.histogram, whole.histogram)
    assert found.worst is not None and found.loss is not None and not folder.exists()


def test_nothing_is_counted_or_left_of_a_slide_that_fails(tmp_path):
    probs, mask = np.full((1, 600, 8), 0.7, np.float32), np.ones((600, 8), np.uint8)

    def bands():
        yield 0, probs, mask
        raise OSError("gone")

    scorer = Scorer(NAMES[:2], binary=True)
    with pytest.raises(OSError, match="gone"):
        score_slide(in_bands(tmp_path / "waiting", CASES[0], (700, 8), bands()), scorer)
    assert scorer.confusion.sum() == scorer.histogram.sum() == len(scorer.names) == 0
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_not_counted(tmp_path):
    layers = [Layer(each, 600, 8, 1, np.uint8, "nearest", pyramid=False) for each in ("classes", "truth")]
    with open_job(tmp_path / "waiting", "killed", layers) as job:
        job.append(dict.fromkeys(("classes", "truth"), np.ones((520, 8), np.uint8)))
    assert list((tmp_path / "waiting").iterdir())
    probs, mask = np.zeros((1, 600, 8), np.float32), np.ones((600, 8), np.uint8)
    scorer = Scorer(NAMES[:2], binary=True)
    score_slide(in_bands(tmp_path / "waiting", CASES[0], (600, 8), iter([(0, probs, mask)])), scorer)
    assert scorer.confusion.tolist() == [[0, 0], [4800, 0]] and not list(tmp_path.iterdir())


@given(st.integers(0, 10**6))
def test_rows_are_paired_wherever_bands_end(seed):
    rng = np.random.default_rng(seed)
    height = int(rng.integers(1, 30))
    rasters = rng.integers(0, 9, (2, height, 3)).astype(np.uint8)
    ends = [sorted({0, height, *rng.integers(0, height, 4).tolist()}) for _ in rasters]
    bands = [
        [(a, raster[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]
        for raster, cuts in zip(rasters, ends, strict=True)
    ]
    parts = list(zip(*pair_rows(*bands), strict=True))
    for raster, pieces in zip(rasters, parts, strict=True):
        np.testing.assert_array_equal(np.concatenate(pieces), raster)


def peak_of_scoring(folder: Path, height: int) -> int:
    """Most bytes that scoring a slide of some height and 1500 columns takes at once, as numpy counts them."""
    pattern = (np.indices((64, 1500)) // 32 % 2).prod(axis=0).astype(np.uint8)
    probs = pattern[None].astype(np.float32)
    bands = ((top, probs, pattern) for top in range(0, height, 64))
    prediction = in_bands(folder, Filters(fill_holes=-1, min_area=5), (height, 1500), bands)
    tracemalloc.start()
    score_slide(prediction, Scorer(NAMES[:2], binary=True))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_memory_does_not_grow_with_height(tmp_path):
    peak_of_scoring(tmp_path / "first", 128)  # what is imported and made once
    low, tall = (peak_of_scoring(tmp_path / str(height), height) for height in (4096, 16384))
    assert tall < low + 3_000_000 < 16384 * 1500, f"{low} bytes, then {tall}"  # 12288 rows more are 18 MB


# ----------------------------------------------------------------------------------------------------------------------
# The command


def write_split(root: Path, classes: int, names=("a", "b")) -> Path:
    """Slides with tissue, and masks of the labels of tiny_runs and of 99."""
    for seed, name in enumerate(names):
        image, mask = draw_slide(seed, (330, 420), classes=max(1, classes - 1), radius=(10, 30))
        write_slide(root / "images" / f"{name}.svs", image)
        labels = mask if classes == 1 else (mask * 10).astype(np.uint8)
        labels[100:220, :200] = 99
        write_mask_tiff(root / "gt" / f"{name}.tif", labels)
    return root


def network(path: Path, classes=1, **changes):
    """A network whose answer on drawn slides has many small objects."""
    geometry = Geometry("crops", (64, 64), 96, 24, 6)
    values = {"mean": (200.0,) * 3, "std": (20.0,) * 3, "tissue": "saturation", "geometry": geometry}
    return write_checkpoint(path / "run.pth", classes=classes, **values | changes)


def run(command, *words):
    command([str(word) for word in (*words, "--cpu", "--backend", "torch", "-log", "logs")])


@pytest.mark.parametrize(("classes", "pixels"), [(1, 50_000_000), (4, 1000)])
def test_filtered_scores_are_those_of_predicted_files(tmp_path, monkeypatch, classes, pixels):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(results, "PNG_PIXELS", pixels)
    root, config = write_split(tmp_path / "val", classes), network(tmp_path, classes, ignore_label=99)
    flags = ("--closing", 3, "--fill-holes", 40, "--min-area", 25, "--min-length", 6)
    threshold = ("-t", 0.47) if classes == 1 else ()
    run(validate.main, "-d", root, "-c", "run.pth", "-o", "plain", *threshold)
    run(validate.main, "-d", root, "-c", "run.pth", "-o", "scores", *threshold, *flags)
    run(validate.main, "-d", root, "-c", "run.pth", "-o", "alone", "--com", *threshold, *flags)
    run(predict.main, "-i", root / "images", "-c", "run.pth", "-o", "out", *threshold, *flags)
    ending = "png" if pixels > 1000 else "ome.tif"
    scorer, known = Scorer(config.class_names, binary=classes == 1), ClassMap.from_config(config)
    for name in ("a", "b"):
        truth = known.encode(read_mask(root / "gt" / f"{name}.tif"), root)
        files = [tmp_path / folder / "masks" / f"{name}.{ending}" for folder in ("out", "scores")]
        assert files[0].read_bytes() == files[1].read_bytes()
        scorer.update_pred(name, known.encode(read_mask(files[0]), files[0]), truth)
    plain, scored, alone = (
        json.loads(Path(folder, "_metrics.json").read_text()) for folder in ("plain", "scores", "alone")
    )
    assert scored["confusion"] == alone["confusion"] == scorer.confusion.tolist() != plain["confusion"]
    assert scored["sweep"] == plain["sweep"] and scored["auc"] == plain["auc"]
    assert not list(Path("scores").glob(".*")) and {path.suffix for path in Path("alone").iterdir()} <= {
        ".csv",
        ".json",
    }


def test_pixels_without_tissue_count_and_are_not_decoded(tmp_path, monkeypatch):
    image, mask = np.full((1024, 1536, 3), 240, np.uint8), np.zeros((1024, 1536), np.uint8)
    image[200:300, 700:900] = (150, 60, 160)
    mask[220:260, 750:800] = mask[900:910, 10:20] = 1
    pair = Pair(
        "s", write_slide(tmp_path / "s.svs", image, levels=3, tile=(64, 64)), write_mask_tiff(tmp_path / "m.tif", mask)
    )
    config = network(tmp_path)
    monkeypatch.setattr("tissue.THUMBNAIL_SIDE", 384)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load, decoded = slide_sources._TiffLevel.load, []

    def counted(level, row, column):
        if level.index == 0:
            decoded.append((row, column))
        return load(level, row, column)

    monkeypatch.setattr(slide_sources._TiffLevel, "load", counted)
    _, forward, _ = load_forward(tmp_path / "run.pth", "cpu", backend="torch")
    with predict_slide(forward, pair, ClassMap.from_config(config), config) as prediction:
        tops, probs, masks = zip(*[(top, p.copy(), m) for top, p, m in prediction.bands], strict=True)
    np.testing.assert_array_equal(np.concatenate(masks), mask)
    outside = ~prediction.plan.tissue.rows(0, 1024).astype(bool)
    assert (np.concatenate(probs, axis=1)[0][outside] == 0).all() and tops[0] == 0
    image_tiles, mask_tiles = 16 * 24, 8 * 12  # those of the mask are of 128 pixels, and all of them count
    assert 0 < len(set(decoded)) and len(decoded) < image_tiles / 3 + mask_tiles


@given(st.integers(0, 10**6), st.integers(1, 260), st.integers(1, 340), st.floats(0, 1))
def test_columns_are_those_of_the_tiles_that_are_predicted(seed, height, width, share):
    rows, cols = (
        plan_axis(size, tile=96, overlap=24, halo=6, stride=16, min_side=16, window="hann") for size in (height, width)
    )
    keep = np.random.default_rng(seed).random((len(rows.origins), len(cols.origins))) < share
    seen = np.zeros((height, width), bool)
    for row, col in zip(*np.nonzero(keep), strict=True):
        seen[rows.origins[row] :, cols.origins[col] :][: rows.tile, : cols.tile] = True
    plan = Plan(rows, cols, keep, None, height, width)
    for top in range(0, height, 7):
        inside = np.zeros(width, bool)
        for left, right in columns_read(plan, top, 1):
            assert 0 <= left < right <= width
            inside[left:right] = True
        np.testing.assert_array_equal(inside, seen[top])
    assert columns_read(replace(plan, keep=None), 0, height) == [(0, width)]


@pytest.mark.parametrize("more", [("--com",), ()])
def test_without_a_counted_pixel_no_scores_are_shown(tmp_path, monkeypatch, capsys, more):
    monkeypatch.chdir(tmp_path)
    root = write_dataset(tmp_path / "discs", train=1, val=2, sizes=((64, 80),))
    for path in (root / "val" / "gt").iterdir():
        write_mask(path, np.full((64, 80), 255, np.uint8))
    network(tmp_path, tissue="none", ignore_label=255)
    run(validate.main, "-d", root / "val", "-c", "run.pth", "-o", "out", *more)
    said = capsys.readouterr().out
    assert "nothing is scored: no pixel counts" in said and "tensorboard" not in said
    assert ("results in" in said) == (not more) and not Path("logs").exists()


def test_predictions_that_are_not_written_have_no_results(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_slide(tmp_path / "new" / "images" / "x.svs", draw_slide(8)[0])
    network(tmp_path)
    run(validate.main, "-d", "new", "-c", "run.pth", "-o", "out", "--com", "--min-area", 9)
    said = capsys.readouterr().out
    assert "predicted without metrics" in said and "results in" not in said
    assert not Path("out").exists() and not Path("logs").exists()
