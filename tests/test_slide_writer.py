"""Tiled TIFF pyramids: what is read back is what was written, whatever happened in between."""

import errno
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tifffile

import slide_writer
import spool
import tile_pyramid
from slide_writer import JobError, Layer, open_job, required_disk

openslide = pytest.importorskip("openslide")
TILE = 32
SIDES = [
    (1, 1),
    (1, 70),
    (70, 1),
    (TILE - 1, TILE),
    (TILE, TILE + 1),
    (TILE + 1, TILE - 1),
    (2 * TILE + 1, 4 * TILE + 3),
]
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    """Nothing here outlives the system, so nothing need wait for the disk: what is synced when is a test of its own."""
    monkeypatch.setattr(os, "fsync", lambda number: None)


# ---- independent slow references


def halve_slowly(image, shrink, level):
    """The next level of (H, W, C), one pixel after the other."""
    height, width = image.shape[:2]
    result = np.zeros((-(-height // 2), -(-width // 2), image.shape[2]), image.dtype)
    for y in range(result.shape[0]):
        for x in range(result.shape[1]):
            ys = [min(2 * y + d, height - 1) for d in (0, 1)]
            xs = [min(2 * x + d, width - 1) for d in (0, 1)]
            if shrink == "nearest":
                result[y, x] = image[ys[level % 2], xs[level % 2]]
            else:
                total = sum(image[a, b].astype(np.float64) for a in ys for b in xs)
                result[y, x] = total / 4 if image.dtype == np.float32 else np.floor(total / 4 + 0.5)
    return result


def levels_slowly(image, layer):
    levels = [image]
    while layer.pyramid and max(levels[-1].shape[:2]) > layer.tile:
        levels.append(halve_slowly(levels[-1], layer.shrink, len(levels)))
    return levels


def make_layers(height, width):
    return [
        Layer("mask", height, width, 1, np.uint8, "nearest", tile=TILE),
        Layer("prob", height, width, 5, np.uint16, "mean", tile=TILE),
        Layer("share", height, width, 2, "uint8", "mean", tile=TILE),
        Layer("labels", height, width, 1, np.uint32, "nearest", tile=TILE),
        Layer("overlay", height, width, 3, np.uint8, "mean", tile=TILE, rgb=True),
        Layer("field", height, width, 1, np.float32, "mean", tile=TILE),
    ]


def make_pixels(layer, seed=0):
    """(H, W, C): noise on the right, one value on the left, where equal tiles are."""
    rng = np.random.default_rng([seed, layer.bands, layer.kind.itemsize])
    shape = (layer.height, layer.width, layer.bands)
    if layer.kind == np.float32:
        image = rng.random(shape, np.float32)
    else:
        image = rng.integers(0, np.iinfo(layer.kind).max, shape, layer.kind, endpoint=True)
    image[:, : layer.width // 2] = image[0, 0]
    return image


def fill(job, pixels, rng=None):
    """Append what is missing, in portions of random heights."""
    top = job.rows_done
    while top < job.height:
        height = job.height if rng is None else rng.integers(0, 2 * TILE)
        rows = {name: image[top : top + height] for name, image in pixels.items()}
        job.append({name: part[..., 0] if part.shape[2] == 1 else part for name, part in rows.items()})
        top += min(height, job.height - top)


def finish_all(job, folder):
    """Every layer in every kind of file that can hold it: {file name: bytes}."""
    for name, layer in job.layers.items():
        for kind in slide_writer.KINDS:
            if kind != "flat" or layer.kind == np.uint8 and (layer.bands == 1 or layer.rgb):
                job.finish(name, folder / f"{name}_{kind}.tif", kind=kind, mpp=(0.25, 0.5))
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def as_image(values, layer):
    """What tifffile reads as (H, W, C)."""
    values = values.reshape((-1, *values.shape[-2:]) if not layer.rgb else values.shape)
    return values if layer.rgb else np.moveaxis(values, 0, 2)


# ---- values and structure


@pytest.mark.parametrize("height,width", SIDES)
def test_every_level_of_every_kind_equals_a_slow_reference(tmp_path, height, width):
    layers = make_layers(height, width)
    pixels = {layer.name: make_pixels(layer) for layer in layers}
    with open_job(tmp_path / "job", "digest", layers) as job:
        fill(job, pixels, np.random.default_rng(1))
        files = finish_all(job, tmp_path / "out")
        assert len(files) == 14
        for layer in layers:
            expected = levels_slowly(pixels[layer.name], layer)
            for level, image in enumerate(expected):
                bands = list(job.bands(layer.name, level))
                assert [top for top, _ in bands] == list(range(0, image.shape[0], TILE))
                found = np.concatenate([rows for _, rows in bands])
                assert found.ndim == (2 if layer.bands == 1 else 3)
                np.testing.assert_allclose(found.reshape(image.shape), image, rtol=1e-6 * (layer.kind == "f4"))
            for kind in slide_writer.KINDS:
                path = tmp_path / "out" / f"{layer.name}_{kind}.tif"
                if path.exists():
                    check_file(path, layer, kind, expected)


def check_file(path, layer, kind, expected):
    with tifffile.TiffFile(path) as tif:
        assert tif.is_ome == (kind == "ome")
        if kind == "ome":
            assert len(tif.series) == 1
            levels = [(level.asarray(), level.pages[0]) for level in tif.series[0].levels]
        else:  # one pixel wide, tifffile does not see that flat pages are levels
            levels = [(page.asarray(), page) for page in tif.pages]
            assert [page.subfiletype for _, page in levels] == [0] + [1] * (len(levels) - 1)
        assert len(levels) == (1 if kind == "tiff" else len(expected))
        for level, (values, page) in enumerate(levels):
            assert values.dtype == layer.kind
            rtol = 1e-6 if layer.kind == np.float32 else 0
            np.testing.assert_allclose(as_image(values, layer), expected[level], rtol=rtol)
            assert page.is_tiled and page.tile == (TILE, TILE)
            assert page.compression == tifffile.COMPRESSION.ADOBE_DEFLATE
            for tag, per_cm in (("XResolution", 4e4), ("YResolution", 2e4)):
                assert np.divide(*page.tags[tag].value) == pytest.approx(per_cm / 2**level)
            assert page.tags["ResolutionUnit"].value == 3


def test_libtiff_reads_planes_and_differences(tmp_path):
    """A second reader, so that a mistake shared with tifffile shows."""
    layer = Layer("prob", 75, 50, 3, np.uint16, "mean", tile=TILE)
    over = Layer("overlay", 75, 50, 3, np.uint8, "mean", tile=TILE, rgb=True)
    pixels = {"prob": make_pixels(layer), "overlay": make_pixels(over)}
    with open_job(tmp_path / "job", "d", [layer, over]) as job:
        fill(job, pixels)
        for name in pixels:
            job.finish(name, tmp_path / f"{name}.tif", kind="tiff")
    from PIL import Image

    import image_io

    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "overlay.tif")), pixels["overlay"])
    np.testing.assert_array_equal(image_io.read_image(tmp_path / "prob.tif"), pixels["prob"])
    np.testing.assert_array_equal(image_io.read_image(tmp_path / "overlay.tif"), pixels["overlay"])


@pytest.mark.parametrize("height,width", [(150, 201), (TILE, TILE + 1), (20, 300)])
@pytest.mark.parametrize("name", ["mask", "overlay"])
def test_openslide_reads_flat_pyramids(tmp_path, name, height, width):
    layer = next(layer for layer in make_layers(height, width) if layer.name == name)
    pixels = make_pixels(layer)
    with open_job(tmp_path / "job", "d", [layer]) as job:
        fill(job, {name: pixels})
        job.finish(name, tmp_path / "flat.tif", kind="flat", mpp=(0.25, 0.5))
    levels = levels_slowly(pixels, layer)
    with openslide.OpenSlide(tmp_path / "flat.tif") as slide:
        assert slide.level_count == len(levels)
        assert slide.properties["openslide.vendor"] == "generic-tiff"
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.25)
        assert float(slide.properties["openslide.mpp-y"]) == pytest.approx(0.5)
        for level, image in enumerate(levels):
            assert slide.level_dimensions[level] == image.shape[1::-1]
            found = np.asarray(slide.read_region((0, 0), level, image.shape[1::-1]))
            np.testing.assert_array_equal(found[..., :3], np.broadcast_to(image, (*image.shape[:2], 3)))
            assert (found[..., 3] == 255).all()


def test_nearest_stays_near_the_centre_and_keeps_labels():
    size = 2**9
    places = np.stack(np.mgrid[:size, :size], axis=2).astype(np.uint16)
    for level in range(1, 9):
        places = tile_pyramid.shrink_plane(places, "nearest", level)
        side = 2**level
        centres = np.arange(size // side) * side + (side - 1) / 2
        assert np.abs(places[:, 0, 0] - centres).max() <= side / 4
        assert np.abs(places[0, :, 1] - centres).max() <= side / 4


def test_levels_stop_when_the_longer_side_fits_one_tile():
    assert Layer("a", 512, 512, 1, "uint8", "mean").sizes() == [(512, 512)]
    assert Layer("a", 513, 3, 1, "uint8", "mean").sizes() == [(513, 3), (257, 2)]
    assert Layer("a", 5000, 3, 1, "uint8", "mean", pyramid=False).sizes() == [(5000, 3)]


def test_ome_says_what_is_in_it(tmp_path):
    layer = Layer("prob", 100, 90, 3, np.uint16, "mean", tile=TILE)
    with open_job(tmp_path / "job", "d", [layer]) as job:
        fill(job, {"prob": make_pixels(layer)})
        names = ["background", "vein <2>", "Ader größer"]
        job.finish("prob", tmp_path / "p.tif", kind="ome", mpp=(0.25, 0.5), band_names=names)
    with tifffile.TiffFile(tmp_path / "p.tif") as tif:
        assert tif.series[0].axes == "CYX" and len(tif.pages) == 3 and len(tif.pages[2].subifds) == 2
        found = tifffile.xml2dict(tif.ome_metadata)["OME"]["Image"]
        assert found["Name"] == "prob"
        assert found["Pixels"]["PhysicalSizeX"] == 0.25 and found["Pixels"]["PhysicalSizeY"] == 0.5
        assert found["Pixels"]["PhysicalSizeXUnit"] == "µm"
        assert [channel["Name"] for channel in found["Pixels"]["Channel"]] == names


@pytest.mark.parametrize("bands", [1, 2])
def test_georeference_goes_to_the_main_page_alone(tmp_path, bands):
    layer = Layer("mask", 100, 90, bands, np.uint8, "nearest", tile=TILE)
    tags = [(33550, "d", 3, (0.5, 0.5, 0.0), False), (33922, "d", 6, (0.0, 0.0, 0.0, 10.0, 20.0, 0.0), False)]
    kinds = slide_writer.KINDS if bands == 1 else ("tiff", "ome")
    with open_job(tmp_path / "job", "d", [layer]) as job:
        fill(job, {"mask": make_pixels(layer)})
        for kind in kinds:
            job.finish("mask", tmp_path / f"{kind}.tif", kind=kind, extratags=tags)
    for kind in kinds:
        with tifffile.TiffFile(tmp_path / f"{kind}.tif") as tif:
            main, *others = tif.pages
            others += [page for each in tif.pages for page in each.pages or ()]
            assert len(others) == {"tiff": 0, "flat": 2, "ome": 2 * bands + bands - 1}[kind]
            assert main.tags[33550].value == (0.5, 0.5, 0.0) and main.tags[33922].value[3:5] == (10.0, 20.0)
            assert all(33550 not in page.tags and 33922 not in page.tags for page in others)
            assert 306 not in main.tags and main.tags["Software"].value == "Tessera"


def test_files_past_the_limit_are_bigtiff(tmp_path, monkeypatch):
    layer = Layer("mask", 100, 90, 1, np.uint8, "nearest", tile=TILE)
    pixels = make_pixels(layer)
    with open_job(tmp_path / "job", "d", [layer]) as job:
        fill(job, {"mask": pixels})
        job.finish("mask", tmp_path / "small.tif", kind="ome")
        monkeypatch.setattr(slide_writer, "BIGTIFF_BYTES", 1000)
        for kind in slide_writer.KINDS:
            job.finish("mask", tmp_path / f"{kind}.tif", kind=kind)
            with tifffile.TiffFile(tmp_path / f"{kind}.tif") as tif:
                assert tif.is_bigtiff
                np.testing.assert_array_equal(tif.series[0].asarray(), pixels[..., 0])
        with openslide.OpenSlide(tmp_path / "flat.tif") as slide:
            assert slide.level_count == 3
    with tifffile.TiffFile(tmp_path / "small.tif") as tif:
        assert not tif.is_bigtiff


def test_equal_tiles_are_encoded_once(tmp_path, monkeypatch):
    layer = Layer("mask", 3 * TILE, 10 * TILE, 1, np.uint8, "nearest", tile=TILE, pyramid=False)
    pixels = np.zeros((layer.height, layer.width, 1), np.uint8)
    pixels[:TILE, :TILE] = 7
    calls = []
    encode = tile_pyramid.imagecodecs.deflate_encode
    monkeypatch.setattr(slide_writer, "THREADS", 1)
    monkeypatch.setattr(tile_pyramid.imagecodecs, "deflate_encode", lambda *a, **k: calls.append(1) or encode(*a, **k))
    with open_job(tmp_path / "job", "d", [layer]) as job:
        fill(job, {"mask": pixels})
        np.testing.assert_array_equal(np.concatenate([rows for _, rows in job.bands("mask")]), pixels[..., 0])
    assert len(calls) == 2


def test_many_different_constant_tiles(tmp_path):
    layer = Layer("labels", TILE, 200 * TILE, 1, np.uint32, "nearest", tile=TILE)
    pixels = np.repeat(np.arange(200, dtype=np.uint32), TILE)[None, :, None].repeat(TILE, 0) + np.uint32(70000)
    with open_job(tmp_path / "job", "d", [layer]) as job:
        fill(job, {"labels": pixels})
        np.testing.assert_array_equal(next(job.bands("labels"))[1], pixels[..., 0])


def test_memory_is_a_few_rows_of_tiles_whatever_the_height(tmp_path, monkeypatch):
    monkeypatch.setattr(tile_pyramid, "AT_ONCE", 4)
    portion = np.random.default_rng(0).integers(0, 65536, (128, 2048, 2), np.uint16)
    peaks = []
    for tile_rows in (4, 16):
        layer = Layer("prob", 128 * tile_rows, 2048, 2, np.uint16, "mean", tile=128)
        with open_job(tmp_path / f"job{tile_rows}", "d", [layer]) as job:
            tracemalloc.start()
            for _ in range(tile_rows):
                job.append({"prob": portion})
            for _ in job.bands("prob"):
                pass
            job.finish("prob", tmp_path / "p.tif", kind="ome")
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    assert max(peaks) < 3.5 * portion.nbytes and peaks[1] < 1.1 * peaks[0]


# ---- going on


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """(layers, pixels, files) of a job that ran through in one piece."""
    folder = tmp_path_factory.mktemp("whole")
    layers = make_layers(9 * TILE + 5, 3 * TILE + 1)
    pixels = {layer.name: make_pixels(layer) for layer in layers}
    with open_job(folder / "job", "digest", layers) as job:
        fill(job, pixels)
        return layers, pixels, finish_all(job, folder / "out")


def test_portions_make_no_difference(tmp_path, uninterrupted):
    layers, pixels, files = uninterrupted
    for seed in range(3):
        with open_job(tmp_path / f"job{seed}", "another digest", layers) as job:
            fill(job, pixels, np.random.default_rng(seed))
            assert finish_all(job, tmp_path / f"out{seed}") == files


@pytest.mark.parametrize("done", range(0, 10))
def test_every_row_of_tiles_is_a_place_to_go_on(tmp_path, uninterrupted, done):
    layers, pixels, files = uninterrupted
    rows = done * TILE + 4
    with open_job(tmp_path / "job", "digest", layers) as job:
        job.append({name: image[:rows] for name, image in pixels.items()})
        assert job.rows_done == min(done * TILE, job.height)
        before = [rows for _, rows in job.bands("prob", 1)]
    with open_job(tmp_path / "job", "digest", layers) as job:
        assert job.rows_done == min(done * TILE, job.height)
        np.testing.assert_equal([rows for _, rows in job.bands("prob", 1)], before)
        fill(job, pixels, np.random.default_rng(done))
        assert finish_all(job, tmp_path / "out") == files
    with open_job(tmp_path / "job", "digest", layers) as job:
        assert job.rows_done == job.height
        assert finish_all(job, tmp_path / "again") == files
        job.remove()
    assert not (tmp_path / "job").exists()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc to tell which file is synced")
def test_files_are_on_the_disk_before_the_journal_counts_them(tmp_path, uninterrupted, monkeypatch):
    layers, pixels, _ = uninterrupted
    synced = {}  # file name: size when it was last synced
    monkeypatch.setattr(
        os,
        "fsync",
        lambda number: synced.update({Path(f"/proc/self/fd/{number}").readlink().name: os.fstat(number).st_size}),
    )
    checked = 0
    append = spool.Journal.append

    def check(journal, content):
        nonlocal checked
        if "rows" in content:
            sizes = {path.name: path.stat().st_size for path in journal.path.parent.glob("*.*.*")}
            assert {name: size for name, size in synced.items() if name in sizes} == sizes
            checked += 1
        append(journal, content)
        assert synced["journal"] == journal.path.stat().st_size

    monkeypatch.setattr(spool.Journal, "append", check)
    with open_job(tmp_path / "job", "digest", layers) as job:
        fill(job, pixels)
        job.finish("mask", tmp_path / "out" / "m.tif", kind="ome")
    assert checked == 10
    assert tmp_path.joinpath("out", "m.tif").stat().st_size in synced.values() and "out" in synced


def last_line_sizes(folder):
    """Bytes of every file that the last whole journal line counts, by file name."""
    _, line = spool.Journal(folder / "journal").load()[-1]
    layers = make_layers(9 * TILE + 5, 3 * TILE + 1)
    sizes = {"journal": (folder / "journal").stat().st_size}
    for layer, bytes_of_levels in zip(layers, line["sizes"], strict=True):
        across = -(-np.array([width for _, width in layer.sizes()]) // TILE) * layer.planes
        for level, (size, rows, tiles) in enumerate(
            zip(bytes_of_levels, layer.tile_rows(line["rows"]), across, strict=True)
        ):
            sizes[f"{layer.name}.{level}.tiles"] = size
            sizes[f"{layer.name}.{level}.index"] = rows * int(tiles) * 16
    return sizes


@pytest.mark.parametrize("seed", range(12))
def test_whatever_lies_behind_the_last_line_is_dropped(tmp_path, uninterrupted, seed):
    layers, pixels, files = uninterrupted
    rng = np.random.default_rng(seed)
    rows = int(rng.integers(TILE, 9 * TILE))
    with open_job(tmp_path / "job", "digest", layers) as job:
        job.append({name: image[:rows] for name, image in pixels.items()})
        safe = job.rows_done
    for name, size in last_line_sizes(tmp_path / "job").items():
        with (tmp_path / "job" / name).open("r+b") as handle:
            handle.seek(size)
            handle.write(rng.bytes(int(rng.integers(0, 3000))))  # torn tiles, half an index entry, a torn line
    with open_job(tmp_path / "job", "digest", layers) as job:
        assert job.rows_done == safe
        assert {path.name: path.stat().st_size for path in job.folder.glob("*.*")} == {
            name: size for name, size in last_line_sizes(job.folder).items() if name != "journal"
        }
        fill(job, pixels, rng)
        assert finish_all(job, tmp_path / "out") == files


@pytest.mark.parametrize("seed", range(8))
def test_a_loss_before_the_last_line_goes_back(tmp_path, uninterrupted, seed):
    """A disk that lied about being synced: a file is shorter than the journal says, or other bytes are in it."""
    layers, pixels, files = uninterrupted
    rng = np.random.default_rng(seed)
    with open_job(tmp_path / "job", "digest", layers) as job:
        job.append({name: image[: 6 * TILE] for name, image in pixels.items()})
    name = ["mask.0.tiles", "prob.1.tiles", "overlay.0.index", "labels.1.index"][seed % 4]
    path = tmp_path / "job" / name
    with path.open("r+b") as handle:
        if seed < 4:
            handle.truncate(path.stat().st_size - int(rng.integers(1, 17)))
        else:
            handle.seek(-int(rng.integers(1, 17)), io.SEEK_END)
            byte = handle.read(1)
            handle.seek(-1, io.SEEK_CUR)
            handle.write(bytes([byte[0] ^ 255]))
    with open_job(tmp_path / "job", "digest", layers) as job:
        assert job.rows_done in (4 * TILE, 5 * TILE)
        fill(job, pixels, rng)
        assert finish_all(job, tmp_path / "out") == files


def test_a_lost_file_means_all_rows_again(tmp_path, uninterrupted):
    layers, pixels, files = uninterrupted
    for name in ("mask.0.tiles", "prob.1.index"):
        with open_job(tmp_path / "job", "digest", layers) as job:
            fill(job, pixels)
        (tmp_path / "job" / name).unlink()
        with open_job(tmp_path / "job", "digest", layers) as job:
            assert job.rows_done == 0
            fill(job, pixels)
            assert finish_all(job, tmp_path / "out") == files


def test_a_torn_journal_line_does_not_count(tmp_path, uninterrupted):
    layers, pixels, files = uninterrupted
    with open_job(tmp_path / "job", "digest", layers) as job:
        job.append({name: image[: 3 * TILE] for name, image in pixels.items()})
    journal = (tmp_path / "job" / "journal").read_bytes()
    starts = [0, *(place + 1 for place in range(len(journal)) if journal[place : place + 1] == b"\n")]
    assert len(starts) == 5
    for cut in [*range(starts[2], starts[3] + 20, 37), len(journal) - 1]:
        shutil.copytree(tmp_path / "job", tmp_path / f"cut{cut}")
        (tmp_path / f"cut{cut}" / "journal").write_bytes(journal[:cut])
        with open_job(tmp_path / f"cut{cut}", "digest", layers) as job:
            assert job.rows_done == (2 if cut >= starts[3] else 1) * TILE
    fill_from = tmp_path / f"cut{len(journal) - 1}"
    with open_job(fill_from, "digest", layers) as job:
        fill(job, pixels)
        assert finish_all(job, tmp_path / "out") == files


WORKER = """
import sys, time
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
from slide_writer import open_job
from test_slide_writer import TILE, fill, finish_all, make_layers, make_pixels
layers = make_layers(9 * TILE + 5, 3 * TILE + 1)
pixels = {{layer.name: make_pixels(layer) for layer in layers}}
folder = Path({folder!r})
print("ready", flush=True)
with open_job(folder / "job", "digest", layers) as job:
    print("rows", job.rows_done, flush=True)
    for top in range(job.rows_done, job.height, 8):
        job.append({{name: image[top : top + 8] for name, image in pixels.items()}})
        print("appended", flush=True)
        time.sleep(0.01)
    print("finishing", flush=True)
    finish_all(job, folder / "out")
print("complete", flush=True)
"""


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_sigkill_at_random_moments(tmp_path, uninterrupted):
    _, _, files = uninterrupted
    code = WORKER.format(root=str(ROOT), tests=str(ROOT / "tests"), folder=str(tmp_path))
    moments = random.Random(5)
    starts = []
    for kill in range(7):  # five times while rows come in, once while files are written
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        said = [process.stdout.readline(), process.stdout.readline()]
        starts.append(int(said[1].split()[1]))
        if kill < 6:
            for _ in range(moments.randrange(2, 8) if kill < 5 else 100):
                if process.stdout.readline() == "finishing\n":
                    break
            time.sleep(moments.uniform(0, 0.01))
            process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == (-signal.SIGKILL if kill < 6 else 0)
    assert starts == sorted(starts) and starts[-1] >= 2 * TILE
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == files


def test_what_a_kill_left_beside_the_target_is_overwritten(tmp_path):
    layer = Layer("mask", 40, 40, 1, np.uint8, "nearest", tile=TILE)
    with open_job(tmp_path / "job", "d", [layer]) as job:
        fill(job, {"mask": make_pixels(layer)})
        with pytest.raises(KeyboardInterrupt), slide_writer.replacing(tmp_path / "out" / "m.tif") as handle:
            left = Path(handle.name)
            raise KeyboardInterrupt
        assert left.name.startswith(".") and not left.exists()
        left.write_bytes(b"x" * 100_000)
        job.finish("mask", tmp_path / "out" / "m.tif", kind="tiff")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["m.tif"]


def test_another_digest_or_layer_or_journal_starts_anew(tmp_path):
    layer = Layer("mask", 100, 90, 1, np.uint8, "nearest", tile=TILE)
    pixels = make_pixels(layer)

    def prepare():
        with open_job(tmp_path / "job", "d", [layer]) as job:
            job.append({"mask": pixels[len(range(job.rows_done)) : 70]})
            assert job.rows_done == 64

    prepare()
    (tmp_path / "job" / "notes.txt").write_text("mine")
    (tmp_path / "job" / "book.index").write_text("mine too")
    for digest, other in (("e", layer), ("d", Layer("mask", 100, 90, 1, np.uint8, "mean", tile=TILE))):
        with open_job(tmp_path / "job", digest, [other]) as job:
            assert job.rows_done == 0 and list(job.bands("mask")) == []
            fill(job, {"mask": pixels})
            np.testing.assert_array_equal(np.concatenate([rows for _, rows in job.bands("mask")]), pixels[..., 0])
        prepare()
    (tmp_path / "job" / "journal").write_bytes(b"\xff\x00 no journal")
    with open_job(tmp_path / "job", "d", [layer]) as job:
        assert job.rows_done == 0
        job.remove()
    assert sorted(path.name for path in (tmp_path / "job").iterdir()) == ["book.index", "notes.txt"]


# ---- locks and damage


def test_a_second_process_is_refused(tmp_path):
    layer = Layer("mask", 100, 90, 1, np.uint8, "nearest", tile=TILE)
    folder = tmp_path / "job"
    code = (
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); from pathlib import Path\n"
        f"from slide_writer import Layer, open_job\n"
        f"job = open_job(Path({str(folder)!r}), 'd', [Layer('mask', 100, 90, 1, 'uint8', 'nearest', tile=32)])\n"
        "print('open', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "open\n"
        with pytest.raises(JobError, match=rf"job is in use by another process \(number {process.pid}\); expected one"):
            open_job(folder, "d", [layer])
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    with open_job(folder, "d", [layer]) as job:  # the lock of the dead is taken over
        with pytest.raises(JobError, match="in use"):
            open_job(folder, "another", [layer])
        job.append({"mask": make_pixels(layer)})
        assert job.rows_done == 100
    with open_job(folder, "d", [layer]) as job:
        assert job.rows_done == 100


def test_damage_names_the_tile(tmp_path):
    layer = Layer("prob", 100, 90, 2, np.uint16, "mean", tile=TILE)
    with open_job(tmp_path / "job", "d", [layer]) as job:
        fill(job, {"prob": make_pixels(layer)})
        path = tmp_path / "job" / "prob.0.tiles"
        index = np.fromfile(tmp_path / "job" / "prob.0.index", spool.INDEX_ENTRY)
        tile = (1 * 2 + 1) * 3 + 2  # row 1, second band, column 2, of three columns and two bands
        data = bytearray(path.read_bytes())
        data[index["offset"][tile] + 20] ^= 1
        path.write_bytes(data)
        message = "layer prob, level 0, tile row 1, tile column 2, band 2 is damaged"
        with pytest.raises(JobError, match=message) as caught:
            job.finish("prob", tmp_path / "p.tif", kind="ome")
        assert str(path) in str(caught.value) and "run the same command again" in str(caught.value)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["job"]
        with pytest.raises(JobError, match=message):
            list(job.bands("prob"))
        assert len(list(job.bands("prob", 1))) == 2
        for field, value in (("offset", 2**63 + 5), ("length", 2**32 - 1), ("crc", 0)):
            broken = index.copy()
            broken[field][tile] = value
            broken.tofile(tmp_path / "job" / "prob.0.index")
            with pytest.raises(JobError, match=message):
                list(job.bands("prob"))


def test_a_full_disk_names_the_file_and_keeps_the_rest(tmp_path, uninterrupted, monkeypatch):
    layers, pixels, files = uninterrupted
    write_all = spool.write_all

    def full(handle, data):
        if Path(handle.name).name == "prob.1.tiles" and Path(handle.name).stat().st_size > 10_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_all(handle, data)

    monkeypatch.setattr(spool, "write_all", full)
    with open_job(tmp_path / "job", "digest", layers) as job:
        with pytest.raises(OSError, match="No space left.*encoded tile.*make room, then run") as caught:
            fill(job, pixels, np.random.default_rng(3))
        assert caught.value.filename == str(tmp_path / "job" / "prob.1.tiles") and caught.value.errno == errno.ENOSPC
        safe = job.rows_done
        assert 0 < safe < job.height
        with pytest.raises(JobError, match="open the job again"):
            job.append({name: image[safe:] for name, image in pixels.items()})
    monkeypatch.undo()
    with open_job(tmp_path / "job", "digest", layers) as job:
        assert job.rows_done == safe
        fill(job, pixels)
        assert finish_all(job, tmp_path / "out") == files


@pytest.mark.skipif(os.name == "nt", reason="needs RLIMIT_FSIZE")
def test_a_full_disk_while_the_file_is_written(tmp_path):
    import resource

    layer = Layer("labels", 200, 200, 1, np.uint32, "nearest", tile=TILE)
    pixels = np.random.default_rng(0).integers(0, 2**32, (200, 200), np.uint32)
    with open_job(tmp_path / "job", "d", [layer]) as job:
        job.append({"labels": pixels})
        (tmp_path / "m.tif").write_bytes(b"old")
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        try:
            with pytest.raises(OSError, match="too large.*the finished file.*make room") as caught:
                job.finish("labels", tmp_path / "m.tif", kind="tiff")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert caught.value.filename == str(tmp_path / "m.tif")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["job", "m.tif"]
        assert (tmp_path / "m.tif").read_bytes() == b"old"
        job.finish("labels", tmp_path / "m.tif", kind="tiff")
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "m.tif"), pixels)


# ---- what is refused


def test_wrong_layers_are_refused(tmp_path):
    good = Layer("a", 10, 10, 1, "uint8", "mean")
    for arguments, message in [
        (("a/b", 10, 10, 1, "uint8", "mean"), "'a/b' cannot name a file"),
        (("a", 0, 10, 1, "uint8", "mean"), "0 x 10 pixels"),
        (("a", 10, 10, 1, "int16", "mean"), "a is int16 shrunk by 'mean', expected one of uint8"),
        (("a", 10, 10, 1, "uint8", "median"), "shrunk by 'median'"),
        (("a", 10, 10, 1, "uint32", "mean"), "labels shrink by 'nearest'"),
        (("a", 10, 10, 1, "uint8", "mean", True, 100), "tiles of 100 pixels, expected a multiple of 16"),
        (("a", 10, 10, 2, "uint8", "mean", True, 64, True), "RGB with 2 bands of uint8, expected 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            Layer(*arguments)
    with pytest.raises(ValueError, match=r"named \['a', 'a'\], expected one or more different"):
        open_job(tmp_path / "job", "d", [good, good])
    with pytest.raises(ValueError, match=r"a 10/512, b 11/512"):
        open_job(tmp_path / "job", "d", [good, Layer("b", 11, 10, 1, "uint8", "mean")])
    assert not (tmp_path / "job").exists()


def test_wrong_rows_and_kinds_are_refused(tmp_path):
    layers = [Layer("a", 10, 8, 1, "uint8", "mean"), Layer("b", 10, 8, 2, "uint16", "mean")]
    a, b = np.zeros((4, 8), np.uint8), np.zeros((4, 8, 2), np.uint16)
    with open_job(tmp_path / "job", "d", layers) as job:
        for rows, message in [
            ({"a": a}, r"layer b are missing, expected uint16 \(rows, 8, 2\)"),
            ({"a": a, "b": b[..., 0]}, r"layer b are uint16 \(4, 8, 1\), expected uint16 \(rows, 8, 2\)"),
            ({"a": a.astype(int), "b": b}, "layer a are int64"),
            ({"a": a[:3], "b": b}, "same number of rows of a, b"),
            ({"a": a, "b": b, "c": a}, "same number of rows of a, b"),
            ({"a": np.zeros((11, 8), np.uint8), "b": np.zeros((11, 8, 2), np.uint16)}, "0 [+] 11 rows.*expected 10"),
        ]:
            with pytest.raises(ValueError, match=message):
                job.append(rows)
        job.append({"a": a, "b": b})
        with pytest.raises(JobError, match="0 of 10 rows"):
            job.finish("a", tmp_path / "a.tif", kind="tiff")
        job.append({"a": np.zeros((6, 8), np.uint8), "b": np.zeros((6, 8, 2), np.uint16)})
        with pytest.raises(ValueError, match="'zarr', expected one of tiff, ome, flat"):
            job.finish("a", tmp_path / "a.tif", kind="zarr")
        with pytest.raises(ValueError, match="b has 2 bands of uint16; a flat pyramid holds.*OME-TIFF"):
            job.finish("b", tmp_path / "b.tif", kind="flat")
        with pytest.raises(ValueError, match="2 bands, expected as many names"):
            job.finish("b", tmp_path / "b.tif", kind="ome", band_names=["one"])
    job.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["job"]


def test_required_disk_is_kept(tmp_path):
    rng = np.random.default_rng(0)
    for side in (1, 40, 200):
        layers = make_layers(side, side + 3)
        need = required_disk(layers)
        assert need.expected < need.worst
        with open_job(tmp_path / f"job{side}", "d", layers) as job:
            noise = {layer.name: rng.integers(0, 255, (side, side + 3, layer.bands)) for layer in layers}
            job.append({layer.name: noise[layer.name].astype(layer.kind) for layer in layers})
            for layer in layers:
                job.finish(layer.name, tmp_path / f"job{side}" / f"{layer.name}.tif", kind="ome")
            spools = [path.stat().st_size for path in job.folder.glob("*.*") if path.suffix in (".tiles", ".index")]
            finals = [path.stat().st_size for path in job.folder.glob("*.tif")]
            assert sum(spools) + sum(finals) <= need.worst + 4000 * len(layers)  # tags and the description
    big = required_disk([Layer("prob", 60000, 60000, 1, "uint16", "mean")])
    assert 2 * 7.2e9 * 1.33 < big.worst < 2 * 7.2e9 * 1.36
