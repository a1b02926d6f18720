import csv
import errno
import json
import os
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

import slide_io
from classes import ClassMap
from dataset_utils import tile_cutting, tile_slides
from dataset_utils.tile_cutting import plan_origins
from dataset_utils.tile_masks import Annotation, LabelRule, TileMask
from geojson import GeoJsonWriter
from image_io import file_stem, read_image, read_mask, write_mask
from pairing import Pair
from polygons import trace_labels
from rle import encode_rle
from slide_io import open_slide
from slide_windows import SlideOptions, SlidePair

RNG = np.random.default_rng(3)
HEIGHT, WIDTH = 151, 211
SIDES = st.integers(1, 23)


def make_mask(height=HEIGHT, width=WIDTH, count=9, seed=0):
    """Discs of 1 to 30 pixels, some of them at the border; (H, W) bool."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((height, width), np.uint8)
    for number in range(count):
        centre = int(rng.integers(0, width)), int(rng.integers(0, height))
        cv2.circle(mask, centre, (0, 1, 3, 8, 15, 30)[number % 6], 1, -1)
    return mask > 0


def make_image(height=HEIGHT, width=WIDTH, seed=0):
    """Left two thirds stained, the rest white glass with a grey speck."""
    rng = np.random.default_rng(seed)
    image = np.full((height, width, 3), 240, np.uint8)
    stained = image[:, : width * 2 // 3]
    stained[:] = (180, 60, 150)
    stained += rng.integers(0, 40, stained.shape).astype(np.uint8)
    image[5:9, -9:-3] = 90
    return image


def write_slide(path, image, steps=(1, 2, 4), tile=64):
    with tifffile.TiffWriter(path) as writer:
        for step in steps:
            smaller = (
                image if step == 1 else cv2.resize(image, None, fx=1 / step, fy=1 / step, interpolation=cv2.INTER_AREA)
            )
            writer.write(
                smaller,
                tile=(tile, tile),
                compression="zlib",
                subfiletype=int(step > 1),
                metadata=None,
                photometric="rgb",
            )


def write_geojson(path, labels, names):
    """Outlines of the 4-connected parts of each label."""
    with GeoJsonWriter(path) as writer:
        number = 1
        for value, name in names.items():
            count, parts = cv2.connectedComponents((labels == value).astype(np.uint8), connectivity=4)
            for polygon in trace_labels(parts.astype(np.uint32)) if count > 1 else []:
                writer.write(polygon, name)
                number += 1


def write_rows(path, rows, columns=("id", "encoding")):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """Thousands of small files need not reach the disk here."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def slides(tmp_path):
    """Three slides with discs, and their annotations in the three forms."""
    for folder in ("slides", "geo", "masks"):
        (tmp_path / folder).mkdir()
    rows = []
    for number, name in enumerate("abc"):
        mask = make_mask(seed=number)
        write_slide(tmp_path / "slides" / f"{name}.tif", make_image(seed=number))
        write_geojson(tmp_path / "geo" / f"{name}.geojson", mask, {1: "disc"})
        tifffile.imwrite(
            tmp_path / "masks" / f"{name}.tif", mask.astype(np.uint8) * 255, tile=(64, 64), compression="zlib"
        )
        rows.append((name, encode_rle(mask)))
    write_rows(tmp_path / "rle.csv", rows)
    return tmp_path


def run(folder, annotations, *more, out="out", size=32, images="slides", workers=0):
    words = [
        "-i",
        folder / images,
        "-a",
        folder / annotations,
        "-o",
        folder / out,
        "--size",
        size,
        "-w",
        workers,
        *more,
    ]
    tile_slides.main([*map(str, words)])
    return folder / out


def fails(capsys, *arguments, status=1, **named):
    with pytest.raises(SystemExit) as stopped:
        run(*arguments, **named)
    assert stopped.value.code == status
    return capsys.readouterr().err


def read_rows(out):
    with (out / "manifest.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def read_tree(folder, hidden=False):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and (hidden or ".tiles" not in path.parts)
    }


def centre_values(labels, scale):
    """Labels of the grid of a scale: what lies at the centre of each of its pixels."""
    places = [
        [min(int((Fraction(i) + Fraction(1, 2)) * Fraction(scale)), side - 1) for i in range(grid_size(side, scale))]
        for side in labels.shape
    ]
    return labels[np.ix_(*places)]


def grid_size(side, scale):
    return max(1, int(side / Fraction(scale) + Fraction(1, 2)))


# ---- masks ----


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 23),
    st.integers(1, 23),
    st.sampled_from([1, 2, 3, 4, 2.5, 3.75]),
    st.floats(0, 0.1),
    st.integers(0, 99),
)
def test_a_window_is_annotated_when_any_pixel_below_it_is(tmp_path_factory, height, width, scale, share, seed):
    rng = np.random.default_rng(seed)
    mask = rng.random((height, width)) < share
    folder = tmp_path_factory.mktemp("window")
    tifffile.imwrite(folder / "s.tif", np.zeros((height, width, 3), np.uint8), photometric="rgb")
    write_rows(folder / "rle.csv", [("s", encode_rle(mask))])
    write_geojson(folder / "s.geojson", mask, {1: "disc"})
    wanted = centre_values(mask, scale)
    top, left = int(rng.integers(0, wanted.shape[0])), int(rng.integers(0, wanted.shape[1]))
    window = top, left, wanted.shape[0] - top, wanted.shape[1] - left
    bottom, right = (min(side, int(np.ceil(n * scale))) for side, n in zip(mask.shape, wanted.shape, strict=True))
    below = mask[min(int(top * scale), height - 1) : bottom, min(int(left * scale), width - 1) : right].any()
    with open_slide(folder / "s.tif") as slide, pytest.MonkeyPatch.context() as patch:
        patch.setattr("slide_masks.CHUNK", int(rng.integers(1, 200)))
        grid = slide.grid(reduce=scale)
        assert (grid.height, grid.width) == wanted.shape
        for name in ("rle.csv", "s.geojson"):
            found, annotated = TileMask(Annotation(folder / name, "s", ""), slide, grid, LabelRule()).read(*window)
            np.testing.assert_array_equal(found, wanted[top:, left:] * np.uint8(255))
            assert annotated == below


@pytest.mark.parametrize("reduce", [1, 4])
@pytest.mark.parametrize("source", ["rle.csv", "geo", "masks"])
def test_tiles_are_what_training_straight_from_the_slide_sees(slides, source, reduce):
    rows = read_rows(run(slides, source, "--reduce", reduce, "--label", "1", "--tissue", "none"))
    classes = ClassMap((1,), ("background", "object"), mask_threshold=0)
    for name in "abc":
        where = slides / source
        mask = {"geo": where / f"{name}.geojson", "masks": where / f"{name}.tif"}.get(source, where)
        pair = Pair(name, slides / "slides" / f"{name}.tif", mask)
        with SlidePair(pair, SlideOptions(reduction=reduce)) as opened:
            mine = [row for row in rows if row["id"] == name]
            assert mine
            for row in mine:
                corner = int(row["y"]) // reduce, int(row["x"]) // reduce
                image, labels = opened.window(classes, corner, (32, 32))
                np.testing.assert_array_equal(read_image(slides / "out" / row["file"]), image)
                np.testing.assert_array_equal(read_mask(slides / "out" / row["mask"]), labels)


def test_the_later_class_lies_on_top_and_one_left_out_covers_nothing(tmp_path):
    (tmp_path / "slides").mkdir()
    tifffile.imwrite(tmp_path / "slides" / "a.tif", np.zeros((40, 40, 3), np.uint8), photometric="rgb")
    first, second = np.zeros((2, 40, 40), bool)
    first[5:25, 5:25], second[15:35, 15:35] = True, True
    runs = [("a", "vein", encode_rle(first)), ("a", "artery", encode_rle(second))]
    write_rows(tmp_path / "rows.csv", runs, ("id", "class", "encoding"))
    write_rows(tmp_path / "columns.csv", [("a", *(row[2] for row in runs))], ("id", "vein", "artery"))
    write_features(
        tmp_path / "a.geojson",
        square(5, 5, 20, classification={"name": "vein"}),
        square(15, 15, 20, classification={"name": "artery"}),
    )
    for value in (9, 0):
        wanted = first * np.uint8(7)
        if value:
            wanted[second] = value
        flags = ["--classes", f"artery={value}", "vein=7", "--tissue", "none"]
        for name in ("rows.csv", "columns.csv", "a.geojson"):
            out = run(tmp_path, name, *flags, out=f"{name}_{value}", size=40)
            np.testing.assert_array_equal(read_mask(out / "gt" / "a_x0_y0.png"), wanted)


@pytest.mark.parametrize("scale", [[], ["--reduce", "4"], ["--level", "1"], ["--reduce", "2.5"]])
def test_run_lengths_polygons_and_mask_files_give_the_same_tiles(slides, scale):
    trees = [run(slides, source, *scale, out=source + "_out") for source in ("rle.csv", "geo", "masks")]
    first, second, third = (read_tree(tree) for tree in trees)
    assert first.keys() == second.keys() == third.keys() and len(first) > 20
    assert first == second == third


@pytest.mark.parametrize("reduce", [1, 4])
@pytest.mark.parametrize("overlap", [0, 0.25, 10])
def test_tiles_are_crops_of_the_whole_slide(slides, reduce, overlap):
    out = run(slides, "rle.csv", "--reduce", reduce, "--overlap", overlap, "--tissue", "none")
    rows = read_rows(out)
    for number, name in enumerate("abc"):
        mask = make_mask(seed=number).astype(np.uint8) * 255
        mask = centre_values(mask, reduce)
        with open_slide(slides / "slides" / f"{name}.tif") as slide:
            grid = slide.grid(reduce=reduce)
            image = grid.read(0, 0, grid.height, grid.width)
        seen = np.zeros(mask.shape, bool)
        for row in (row for row in rows if row["id"] == name):
            y, x = int(row["y"]) // reduce, int(row["x"]) // reduce
            place = np.s_[y : y + 32, x : x + 32]
            np.testing.assert_array_equal(read_image(out / row["file"]), image[place])
            np.testing.assert_array_equal(read_mask(out / row["mask"]), mask[place])
            assert int(row["foreground"]) == int(row["label_255"]) == np.count_nonzero(mask[place])
            assert int(row["width"]) == int(row["height"]) == 32 * reduce
            seen[place] = True
        assert seen.all(), "nothing is lost at the right and bottom"
    assert len({row["file"] for row in rows}) == len(rows)


@pytest.mark.parametrize("case", [(1, 5, 5), (5, 5, 5), (6, 5, 5), (10, 5, 5), (11, 5, 2), (97, 8, 3)])
def test_origins_cover_the_axis_and_the_last_is_moved_in(case):
    length, size, step = case
    origins = plan_origins(length, size, step)
    covered = {place for at in origins for place in range(at, min(at + size, length))}
    assert covered == set(range(length)) and list(origins) == sorted(set(origins))
    assert origins[0] == 0 and origins[-1] == max(0, length - size)
    assert all(b - a <= step for a, b in zip(origins, origins[1:], strict=False))
    assert all(at + size < length for at in origins[:-1]), "no tile is there twice"


def test_a_slide_smaller_than_a_tile_gives_one_tile_of_its_size(tmp_path):
    (tmp_path / "slides").mkdir()
    for name, (height, width) in {"dot": (1, 1), "line": (1, 50), "small": (20, 31)}.items():
        tifffile.imwrite(tmp_path / "slides" / f"{name}.tif", np.full((height, width, 3), (200, 40, 90), np.uint8))
    write_rows(tmp_path / "rle.csv", [("dot", "1 1"), ("line", ""), ("small", "1 20")])
    out = run(tmp_path, "rle.csv", "--tissue", "none")
    sizes = {row["id"]: (row["width"], row["height"]) for row in read_rows(out)}
    assert sizes["dot"] == ("1", "1") and sizes["small"] == ("31", "20") and len(read_rows(out)) == 4  # line: 2 tiles
    mask = read_mask(out / "gt" / "small_x0_y0.png")
    assert mask.shape == (20, 31) and (mask[:, 0] == 255).all() and not mask[:, 1:].any()


# ---- which tiles are kept ----


def test_glass_is_dropped_and_annotated_glass_is_not(tmp_path):
    (tmp_path / "slides").mkdir()
    image = make_image()
    image[:40, :40] = RNG.integers(0, 4, (40, 40, 3))  # black padding with the noise of compression
    write_slide(tmp_path / "slides" / "a.tif", image)
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[100, 190] = True  # one pixel on glass
    write_rows(tmp_path / "rle.csv", [("a", encode_rle(mask))])
    kept = {(int(row["x"]), int(row["y"])): row for row in read_rows(run(tmp_path, "rle.csv"))}
    assert (0, 0) not in kept, "black"
    assert (64, 64) in kept and float(kept[64, 64]["tissue"]) > 0.99
    glass = [place for place in kept if place[0] >= WIDTH * 2 // 3]
    assert glass == [(160, 96), (179, 96)], "the last column is moved in, so both hold the pixel"
    assert {kept[place]["foreground"] + kept[place]["tissue"] for place in glass} == {"10.0000"}
    coarse = read_rows(run(tmp_path, "rle.csv", "--reduce", "4", out="coarse", size=8))
    glass = [row for row in coarse if int(row["x"]) >= WIDTH * 2 // 3]
    assert glass and {row["foreground"] for row in glass} == {"0"}, "too small to be seen, and still kept"


def test_least_tissue_in_pixels_and_as_a_share(slides):
    def count(*flags, out):
        return {(row["id"], row["x"], row["y"]) for row in read_rows(run(slides, "rle.csv", *flags, out=out))}

    everything = count("--tissue", "none", out="none")
    default, same = count(out="default"), count("--min-tissue", "25", out="same")
    assert default == same and len(default) < len(everything)
    assert count("--min-tissue", "0.5", out="half") == count("--min-tissue", "512", out="pixels")
    annotated = {(r["id"], r["x"], r["y"]) for r in read_rows(slides / "none") if r["foreground"] != "0"}
    assert count("--min-tissue", "1024", out="all") == annotated
    otsu = count("--tissue", "otsu", out="otsu")
    assert default - otsu == set() and len(otsu) < len(everything)


@pytest.mark.parametrize(("limit", "flag"), [(0, "0"), (5, "5"), (None, "0.3"), (9999, "9999"), (9999, "1.0")])
def test_empty_tiles_are_capped_by_the_seed(slides, limit, flag):
    free = read_rows(run(slides, "rle.csv", out="free"))
    annotated = [row for row in free if row["foreground"] != "0"]
    rows = read_rows(run(slides, "rle.csv", "--max-empty", flag, out="capped"))
    empty = [row for row in rows if row["foreground"] == "0"]
    wanted = int(len(annotated) * 0.3 / 0.7 + 1e-9) if limit is None else min(limit, len(free) - len(annotated))
    assert len(empty) == wanted and [row for row in rows if row["foreground"] != "0"] == annotated
    assert {row["file"] for row in rows} == {
        path for path in read_tree(slides / "capped") if path.startswith("images/")
    }
    assert all(row in free for row in rows)
    other = read_rows(run(slides, "rle.csv", "--max-empty", flag, "--seed", "1", out="other"))
    assert len(other) == len(rows)
    if 1 < wanted < len(free) - len(annotated):
        assert other != rows


def test_workers_do_not_matter(slides):
    alone = read_tree(run(slides, "geo", "--max-empty", "9", "--val-share", "0.3", out="alone"))
    assert (
        read_tree(run(slides, "geo", "--max-empty", "9", "--val-share", "0.3", out="two", workers=2)).keys()
        == alone.keys()
    )
    differ = [name for name, data in read_tree(slides / "two").items() if data != alone[name]]
    assert differ == []


def test_dry_run_writes_nothing(slides, capsys):
    run(slides, "rle.csv", "--dry-run")
    dry = capsys.readouterr().out
    assert not (slides / "out").exists()
    run(slides, "rle.csv")
    assert capsys.readouterr().out.startswith(dry)
    assert (
        dry.splitlines()[0].split() == "slide tiles annotated empty no tissue no data unreadable over the cap".split()
    )


# ---- labels and names ----


def test_classes_have_their_values_in_every_form(tmp_path):
    for folder in ("slides", "geo", "masks"):
        (tmp_path / folder).mkdir()
    write_slide(tmp_path / "slides" / "a.tif", make_image())
    labels = make_mask(seed=5).astype(np.uint8)
    labels[:, 100:] *= 2
    labels[150:, 200:260] = 7
    names = {1: "tumor", 2: "vessel", 7: "artefact"}
    write_geojson(tmp_path / "geo" / "a.geojson", labels, names)
    tifffile.imwrite(tmp_path / "masks" / "a.tif", labels, tile=(16, 16))
    columns = [encode_rle(labels == value) for value in names]
    write_rows(tmp_path / "columns.csv", [("a.tif", *columns)], ("id", *names.values()))
    rows = [(f"a_{name}", runs) for name, runs in zip(names.values(), columns, strict=True)]
    write_rows(tmp_path / "rows.csv", rows, ("id", "predicted"))
    by_name = ["--reduce", "2", "--classes", "tumor=64", "vessel=300", "artefact=0"]
    by_value = ["--reduce", "2", "--classes", "1=64", "2=300", "7=0"]
    trees = [read_tree(run(tmp_path, "masks", *by_value, out="values"))]
    trees += [
        read_tree(run(tmp_path, name, *by_name, out=f"{name}_out")) for name in ("geo", "columns.csv", "rows.csv")
    ]
    found = {
        value
        for path in trees[0]
        if path.startswith("gt/")
        for value in np.unique(read_mask(tmp_path / "values" / path))
    }
    assert found == {0, 64, 300}
    for tree in trees[1:]:
        assert {k: v for k, v in tree.items() if k != "tiles.json"} == {
            k: v for k, v in trees[0].items() if k != "tiles.json"
        }
    head = (tmp_path / "values" / "manifest.csv").read_text().splitlines()[0]
    assert head == "id,x,y,width,height,scale,mpp,foreground,label_64,label_300,tissue,file,mask"


def test_label_and_names_of_the_predecessor(slides):
    out = run(slides, "masks", "--names", "predecessor", "--reduce", "2", "--tissue", "none")
    assert {path.name for path in out.iterdir() if path.is_dir()} == {"images_32_red2", "masks_32_red2", ".tiles"}
    across, down = len(plan_origins((WIDTH + 1) // 2, 32, 32)), len(plan_origins((HEIGHT + 1) // 2, 32, 32))
    names = sorted(path.name for path in (out / "masks_32_red2").iterdir())
    assert names == sorted(f"{name}_{n}red2.png" for name in "abc" for n in range(across * down))
    values = np.unique([read_mask(out / "masks_32_red2" / name) for name in names])
    assert values.tolist() == [0, 1]
    row = next(row for row in read_rows(out) if row["file"].endswith("b_6red2.png"))
    assert (int(row["x"]), int(row["y"])) == ((6 % across) * 64, (6 // across) * 64)
    assert set(
        np.unique(read_mask(run(slides, "geo", "--label", "64", out="l") / read_rows(slides / "l")[0]["mask"]))
    ) <= {0, 64}


def test_pixels_keep_their_type_and_channels(tmp_path):
    (tmp_path / "slides").mkdir()
    deep = RNG.integers(0, 65535, (70, 80, 3)).astype(np.uint16)
    five = RNG.integers(0, 255, (70, 80, 5)).astype(np.uint8)
    real = RNG.random((70, 80)).astype(np.float32)
    for name, pixels in {"deep": deep, "five": five, "real": real}.items():
        options = {"photometric": "rgb"} if pixels.ndim == 3 else {}
        tifffile.imwrite(tmp_path / "slides" / f"{name}.tif", pixels, tile=(32, 32), planarconfig=None, **options)
    write_rows(tmp_path / "rle.csv", [("deep", ""), ("five", ""), ("real", "")])
    out = run(tmp_path, "rle.csv", "--tissue", "none")
    np.testing.assert_array_equal(read_image(out / "images" / "deep_x0_y0.png"), deep[:32, :32])
    np.testing.assert_array_equal(read_image(out / "images" / "five_x0_y0.tif"), five[:32, :32])
    np.testing.assert_array_equal(read_image(out / "images" / "real_x32_y32.tif")[..., 0], real[32:64, 32:64])


# ---- split, statistics, training ----


def test_split_is_by_slide_and_training_takes_statistics_and_tiles_as_they_are(slides, capsys):
    import validate  # noqa: F401 - the parsers of the chain
    from classes import ClassOptions
    from normalisation import load_or_compute_statistics
    from pairing import FileOptions, Pair, find_splits, share_by_name
    from scan import check_dataset

    out = run(slides, "rle.csv", "--val-share", "0.34")
    train, val = share_by_name([Pair(name, Path(name)) for name in "abc"], 0.34, None)
    for side, pairs in (("train", train), ("val", val)):
        found = {path.name.split("_")[0] for path in (out / side / "images").iterdir()}
        assert found == {pair.name for pair in pairs}
    assert "computed, kept in" in capsys.readouterr().out
    text = (out / "mean_vals.txt").read_bytes()
    checked = check_dataset(*find_splits(out, FileOptions())[:2], ClassOptions())
    assert checked.errors == [] and checked.classes.labels == (255,)
    statistics = load_or_compute_statistics(out, slides / "run", checked.train, ())
    assert statistics.source == str(out / "mean_vals.txt") and (out / "mean_vals.txt").read_bytes() == text


def test_group_pattern_keeps_slides_together(slides, capsys):
    for name in "abc":
        (slides / "slides" / f"{name}.tif").rename(slides / "slides" / f"{'p1' if name < 'c' else 'p2'}_{name}.tif")
        (slides / "geo" / f"{name}.geojson").rename(slides / "geo" / f"{'p1' if name < 'c' else 'p2'}_{name}.geojson")
    out = run(slides, "geo", "--val-share", "0.5", "--group-pattern", "^(p.)")
    sides = [{path.name[:2] for path in (out / side / "images").iterdir()} for side in ("train", "val")]
    assert sorted(map(sorted, sides)) == [["p1"], ["p2"]]
    assert "--val-share" in fails(capsys, slides, "geo", "--group-pattern", "^(p.)", out="x", status=2)


# ---- going on ----


def stop_after(monkeypatch, calls):
    """Raise out of the middle of a run, after so many mask files."""
    real, count = tile_cutting.write_image, iter(range(calls))

    def write(path, pixels):
        if next(count, None) is None:
            raise KeyboardInterrupt
        real(path, pixels)

    monkeypatch.setattr(tile_cutting, "write_image", write)


@pytest.mark.parametrize("calls", [0, 17, 40])
@pytest.mark.parametrize("flags", [[], ["--max-empty", "12"]])
def test_a_run_that_was_cut_off_goes_on(slides, monkeypatch, calls, flags):
    whole = read_tree(run(slides, "rle.csv", *flags, out="whole"))
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, calls)
        with pytest.raises(SystemExit) as stopped:
            run(slides, "rle.csv", *flags)
        assert stopped.value.code == 130
    for path in (slides / "out" / ".tiles").glob("*.jsonl"):
        with path.open("ab") as file:
            file.write(b'{"row": 3, "til')  # as a kill in the middle of a line leaves it
    if (slides / "out" / "gt").is_dir():
        (slides / "out" / "gt" / f".{'0f' * 16}.tmp").write_bytes(b"half a file")
    seen = []
    real = tile_cutting.cut_row
    monkeypatch.setattr(tile_cutting.cut_rows, "__defaults__", (lambda task: seen.append(task) or real(task),))
    run(slides, "rle.csv", *flags)
    assert read_tree(slides / "out") == whole
    before = {path: path.stat().st_mtime_ns for path in (slides / "out").rglob("*.png")}
    seen.clear()
    run(slides, "rle.csv", *flags)
    assert seen == [] and {path: path.stat().st_mtime_ns for path in (slides / "out").rglob("*.png")} == before
    victim = next(iter(before))
    victim.unlink()
    run(slides, "rle.csv", *flags)
    assert read_tree(slides / "out") == whole and len(seen) == 1


def test_other_flags_and_other_folders_are_refused(slides, capsys):
    run(slides, "rle.csv")
    tree = read_tree(slides / "out")
    message = fails(capsys, slides, "rle.csv", "--overlap", "4", "--label", "9")
    assert "other flags" in message and "overlap 0.0 there, 4.0 asked" in message.replace("overlap 0 ", "overlap 0.0 ")
    assert "label None there, 9 asked" in message and read_tree(slides / "out") == tree
    (slides / "mine").mkdir()
    (slides / "mine" / "thesis.txt").write_text("x")
    assert "holds other files" in fails(capsys, slides, "rle.csv", out="mine")
    assert read_tree(slides / "mine") == {"thesis.txt": b"x"}
    (slides / "out" / "tiles.json").write_text("{")
    assert "tiles.json is damaged" in fails(capsys, slides, "rle.csv")


def test_a_changed_annotation_cuts_its_slide_anew(slides, capsys):
    run(slides, "rle.csv", "--max-empty", "6")
    before = {path.name: path.stat().st_mtime_ns for path in (slides / "out" / "gt").iterdir()}
    rows = [(name, encode_rle(make_mask(seed=i if name != "b" else 77))) for i, name in enumerate("abc")]
    write_rows(slides / "rle.csv", rows)
    capsys.readouterr()
    run(slides, "rle.csv", "--max-empty", "6")
    assert "b: the slide or its annotation has changed" in capsys.readouterr().out
    assert read_tree(slides / "out") == read_tree(run(slides, "rle.csv", "--max-empty", "6", out="fresh"))
    same = [row["mask"] for row in read_rows(slides / "out") if row["id"] == "a" and row["foreground"] != "0"]
    assert all((slides / "out" / name).stat().st_mtime_ns == before[Path(name).name] for name in same)


def test_a_slide_that_comes_later_is_added(slides, capsys):
    away = slides / "c.tif"
    (slides / "slides" / "c.tif").rename(away)
    message = fails(capsys, slides, "rle.csv", "--val-share", "0.34", "--max-empty", "6")
    assert "has a row 'c', but no slide" in message and "c.tiff" in message
    away.rename(slides / "slides" / "c.tif")
    out = run(slides, "rle.csv", "--val-share", "0.34", "--max-empty", "6")
    assert read_tree(out) == read_tree(run(slides, "rle.csv", "--val-share", "0.34", "--max-empty", "6", out="fresh"))


# ---- bad input ----


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1 2 3", ["odd", "3 numbers", "even count"]),
        (f"{HEIGHT * WIDTH} 2", [f"within a mask of {HEIGHT} x {WIDTH}", "compare the sizes"]),
        ("0 4", ["starts from 1"]),
        ("5 10 9 3", ["overlap"]),
        ("5 ten", ["'ten'"]),
    ],
)
def test_run_lengths_that_cannot_be_are_named_and_the_rest_is_done(slides, capsys, text, words):
    write_rows(slides / "rle.csv", [("a", "1 5"), ("b", text), ("c", "")])
    message = fails(capsys, slides, "rle.csv")
    assert "rle.csv, row 'b', of the slide" in message and "b.tif" in message
    assert all(word in message for word in words if word != "odd")
    assert {row["id"] for row in read_rows(slides / "out")} == {"a", "c"}
    write_rows(slides / "rle.csv", [("a", "1 5"), ("b", "7 7"), ("c", "")])
    assert {row["id"] for row in read_rows(run(slides, "rle.csv"))} == {"a", "b", "c"}


def test_tables_that_cannot_be(slides, capsys):
    write_rows(slides / "x.csv", [("a", "1 5")], ("name", "encoding"))
    assert "expected id and encoding" in fails(capsys, slides, "x.csv")
    write_rows(slides / "x.csv", [("a", "1 5"), ("b", "1 5"), ("c", "1 5")], ("id", "mask"))
    assert "has the columns id, mask; expected one of encoding, rle, predicted" in fails(capsys, slides, "x.csv")
    write_rows(slides / "x.csv", [("a", "1 5"), ("a", "9 5"), ("c", "1 5")])
    message = fails(capsys, slides, "x.csv", out="twice")
    assert "several rows 'a'" in message and "b.tif has no row 'b'" in message
    assert {row["id"] for row in read_rows(slides / "twice")} == {"c"}
    (slides / "x.csv").write_bytes(b"id,encoding\n\xff\xfe\x00a")
    assert "not a csv file in UTF-8" in fails(capsys, slides, "x.csv")
    message = fails(capsys, slides, "rle.csv", "--classes", "tumor=1", out="classes")
    assert "neither columns named tumor nor rows such as a_tumor" in message
    assert "does not exist" in fails(capsys, slides, "none.csv")


def test_long_run_lengths_are_read(tmp_path):
    (tmp_path / "slides").mkdir()
    noise = RNG.random((400, 400)) < 0.5
    tifffile.imwrite(tmp_path / "slides" / "a.tif", np.zeros((400, 400, 3), np.uint8), tile=(64, 64))
    write_rows(tmp_path / "rle.csv", [("a", encode_rle(noise))])
    assert (tmp_path / "rle.csv").stat().st_size > 131072
    out = run(tmp_path, "rle.csv", size=400)
    np.testing.assert_array_equal(read_mask(out / "gt" / "a_x0_y0.png") > 0, noise)


def write_features(path, *features):
    path.write_text(json.dumps({"type": "FeatureCollection", "features": list(features)}))


def square(left, top, side, **properties):
    ring = [[left, top], [left + side, top], [left + side, top + side], [left, top + side], [left, top]]
    return {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": properties}


def test_shapes_that_cannot_be_are_named_and_the_rest_is_painted(slides, capsys):
    empty = {"type": "Feature", "geometry": None, "properties": {}}
    write_features(slides / "geo" / "a.geojson", square(10, 10, 20), empty, square(5000, 9, 4), square(-8, 40, 16))
    write_features(slides / "geo" / "b.geojson", square(50000, 10, 20))
    write_features(slides / "geo" / "c.geojson")
    message = fails(capsys, slides, "geo", "--tissue", "none")
    assert "a.geojson: feature 2: has the geometry null" in message
    assert "a.geojson: feature 3: lies wholly outside" in message and "feature 4: lies partly outside" in message
    assert "b.geojson: no annotation lies on" in message and "of another image, level or in map units" in message
    rows = read_rows(slides / "out")
    assert {row["id"] for row in rows} == {"a", "c"} and message.count("\n  - ") == 4
    assert sum(int(row["foreground"]) for row in rows if row["id"] == "a") == 20 * 20 + 8 * 16
    again = fails(capsys, slides, "geo", "--tissue", "none")
    assert sorted(again.splitlines()) == sorted(message.splitlines()), "said again when nothing is left to do"


def test_files_that_are_no_annotation(slides, capsys):
    (slides / "geo" / "a.geojson").write_text('{"type": "FeatureCollection", "features": [')
    write_features(slides / "geo" / "b.geojson", square(9, 9, 9, classification={"name": "vessel"}))
    (slides / "geo" / "c.json").write_text("{}")
    write_features(slides / "geo" / "d.geojson")
    message = fails(capsys, slides, "geo", "--classes", "tumor=3")
    assert "a.geojson ends too early" in message
    assert "b.geojson has shapes of the classes vessel, which have no value; expected tumor" in message
    assert "c.tif has 2 annotations, c.geojson and c.json" in message
    assert "d.geojson belongs to no slide" in message
    assert (slides / "out" / "manifest.csv").is_file()


def test_masks_that_do_not_fit(slides, capsys):
    tifffile.imwrite(slides / "masks" / "a.tif", np.zeros((HEIGHT, WIDTH - 1), np.uint8))
    tifffile.imwrite(
        slides / "masks" / "b.tif", RNG.integers(0, 9, (HEIGHT, WIDTH, 3)).astype(np.uint8), photometric="rgb"
    )
    tifffile.imwrite(slides / "masks" / "c.tif", RNG.random((HEIGHT, WIDTH)).astype(np.float32))
    message = fails(capsys, slides, "masks")
    assert f"a.tif is {HEIGHT}x{WIDTH - 1}, its slide" in message and f"has the sizes {HEIGHT}x{WIDTH}, " in message
    assert "b.tif has 3 channels that differ" in message and "c.tif holds the values" in message
    write_mask(slides / "masks" / "a.tif", np.full((HEIGHT, WIDTH), 3, np.uint8))
    message = fails(capsys, slides, "masks", "--classes", "4=1", out="x")
    assert "holds the values [3], which no class names; expected [0, 4]" in message
    assert "'tumor' is no value of a mask file" in fails(capsys, slides, "masks", "--classes", "tumor=1", out="y")


def damage(path):
    """Overwrite the first tile of every level with rubbish."""
    with tifffile.TiffFile(path) as tif:
        places = [(page.dataoffsets[0], page.databytecounts[0]) for page in tif.pages]
    with path.open("r+b") as file:
        for offset, size in places:
            file.seek(offset)
            file.write(b"\xaa" * size)


@pytest.mark.parametrize("reduce", [1, 2.5])
@pytest.mark.parametrize("folder", ["slides", "masks"])
def test_a_damaged_tile_is_named_and_the_rest_is_done(slides, capsys, folder, reduce):
    damage(slides / folder / "b.tif")
    message = fails(capsys, slides, "masks", "--tissue", "none", "--reduce", reduce)
    assert f"{folder}/b.tif" in message and "row 0, column 0" in message and "is damaged" in message
    assert message.count("\n  - ") == 1
    rows = read_rows(slides / "out")
    assert {row["id"] for row in rows} == {"a", "b", "c"}
    whole = (
        read_rows(run(slides, "geo", "--tissue", "none", "--reduce", reduce, out="geo_out"))
        if folder == "masks"
        else rows
    )
    assert not any(row["id"] == "b" and float(row["x"]) < 64 and float(row["y"]) < 64 for row in rows)
    assert len(whole) >= len(rows)


def test_slides_that_cannot_be_read(slides, capsys):
    (slides / "slides" / "a.tif").write_bytes(b"II*\0 not a slide")
    tifffile.imwrite(slides / "slides" / "b.tif", np.zeros((HEIGHT, WIDTH), np.uint8), tile=(64, 64))
    message = fails(capsys, slides, "rle.csv")
    assert "a.tif" in message and "b.tif has 1 channel(s) and no saturation; use --tissue otsu" in message
    assert {row["id"] for row in read_rows(slides / "out")} == {"c"}
    assert "does not say how many microns" in fails(capsys, slides, "rle.csv", "--mpp", "0.5", out="x")
    assert "has no level 7" in fails(capsys, slides, "rle.csv", "--level", "7", out="y")


def test_words_that_cannot_be(slides, capsys):
    for flags, words in (
        (["--overlap", "32"], "leaves no step"),
        (["--reduce", "0.5"], "would enlarge"),
        (["--label", "3", "--classes", "a=1"], "give one of them"),
        (["--label", "70000"], "out of range"),
        (["--classes", "a=1", "a=2"], "names a class twice"),
        (["--classes", "a"], "expected a class and its mask value"),
        (["--max-empty", "1.5"], "expected a whole number, or a share"),
        (["--reduce", "2", "--level", "1"], "not allowed with"),
    ):
        assert words in fails(capsys, slides, "rle.csv", *flags, status=2), flags
    assert "no image or slide" in fails(capsys, slides, "rle.csv", images="none")
    (slides / "slides" / "a.png").write_bytes(b"")
    assert "would both give tiles named a_" in fails(capsys, slides, "rle.csv")
    (slides / "slides" / "a.png").unlink()
    assert "cannot be split" in fails(capsys, slides, "geo", "--val-share", "0.5", "--group-pattern", "^()")
    assert not (slides / "out").exists()


def test_a_full_disk_is_named_and_the_run_goes_on_later(slides, capsys, monkeypatch):
    whole = read_tree(run(slides, "rle.csv", out="whole"))
    real = tile_cutting.write_image

    def write(path, pixels):
        if path.name.startswith("b_x96"):
            raise OSError(errno.ENOSPC, "No space left on device; nothing was saved here", str(path))
        real(path, pixels)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tile_cutting, "write_image", write)
        message = fails(capsys, slides, "rle.csv")
    assert message.count("\n  - ") == 1 and "b: [Errno 28] No space left" in message and "b_x96_y0.png" in message
    assert {row["id"] for row in read_rows(slides / "out")} == {"a", "c"}, "a row of tiles counts when it is whole"
    assert read_tree(run(slides, "rle.csv")) == whole


def test_neither_slide_nor_mask_is_read_whole(slides, monkeypatch):
    seen = {}
    read = slide_io.Grid.read

    def spy(self, *window):
        seen.setdefault(self.path.parent.name, set()).add(window[2:])
        return read(self, *window)

    monkeypatch.setattr(slide_io.Grid, "read", spy)
    run(slides, "masks", "--reduce", "2")
    assert seen["slides"] == {(32, 32)} and {max(window) for window in seen["masks"]} <= {62, 63, 64}


def test_slides_and_annotations_pair_by_id():
    names = ["a.tif", "a.ome.tiff", "b.c.SVS", "b.OME.tif", "cafe\u0301.png"]
    assert [file_stem(Path(name)) for name in names] == ["a", "a", "b.c", "b", "caf\u00e9"]


def test_one_file_is_enough_for_one_slide(slides, capsys):
    out = run(slides, "geo/b.geojson", images="slides/b.tif")
    assert {row["id"] for row in read_rows(out)} == {"b"}
    assert read_tree(run(slides, "masks/b.tif", images="slides/b*", out="glob")) == read_tree(out)
    assert "is one annotation for 3 slides" in fails(capsys, slides, "geo/b.geojson", out="x")


@pytest.mark.skipif("TESSERA_DATA" not in os.environ, reason="TESSERA_DATA names no folder of real data")
def test_a_real_slide(tmp_path):
    path = Path(os.environ["TESSERA_DATA"]) / "slides" / "CMU-1-Small-Region.svs"
    write_features(tmp_path / "CMU-1-Small-Region.geojson", square(300, 400, 601), square(1500, 2000, 500))
    out = run(tmp_path, "CMU-1-Small-Region.geojson", "--mpp", "1.996", images=str(path), size=128, workers=2)
    rows = read_rows(out)
    with open_slide(path) as slide:
        source = Annotation(tmp_path / "CMU-1-Small-Region.geojson", "", "")
        mask, _ = TileMask(source, slide, slide.grid(), LabelRule()).read(0, 0, slide.height, slide.width)
        grid = slide.grid(reduce=4)
        image = grid.read(0, 0, grid.height, grid.width)
    assert int(mask.sum()) == 255 * (601**2 + 500**2)
    wanted = centre_values(mask, 4)
    for row in rows:
        y, x = int(row["y"]) // 4, int(row["x"]) // 4
        np.testing.assert_array_equal(read_image(out / row["file"]), image[y : y + 128, x : x + 128])
        np.testing.assert_array_equal(read_mask(out / row["mask"]), wanted[y : y + 128, x : x + 128])
    assert 20 < len(rows) <= 30 and {row["mpp"] for row in rows} == {"1.996"}
