import os
import re
import struct
import sys
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_image_io import FILES, encode, put, tiff

import slide_io
import slide_sources
from dataset import read_layer
from image_io import ImageError, read_image, write_image
from slide_io import Georeference, SlideError, open_slide

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (303, 417, 3)).astype(np.uint8)  # no multiple of tiles, strips or blocks
SMOOTH = cv2.GaussianBlur(NOISE, (9, 9), 0)
DATA = Path(os.environ.get("TESSERA_DATA", "none"))
real = pytest.mark.skipif("TESSERA_DATA" not in os.environ, reason="TESSERA_DATA names no folder of real data")


def write_pyramid(path, image, steps=(1, 2, 4), *, subifds=False, **options):
    """Levels by plain subsampling, so that no average can be mistaken for them."""
    with tifffile.TiffWriter(path) as writer:
        for step in steps:
            first = step == steps[0]
            writer.write(
                image[::step, ::step],
                subifds=len(steps) - 1 if subifds and first else None,
                subfiletype=int(not first),
                metadata=None,
                **options,
            )


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """One picture in five kinds of file."""
    folder = tmp_path_factory.mktemp("slides")
    tifffile.imwrite(folder / "tiled.tif", NOISE, tile=(64, 48), compression="zlib")
    tifffile.imwrite(folder / "strips.tif", NOISE, rowsperstrip=7, compression="lzw", predictor=True)
    tifffile.imwrite(folder / "raw.tif", NOISE, rowsperstrip=5)
    write_pyramid(folder / "pyramid.tif", NOISE, tile=(32, 32), compression="zlib")
    write_image(folder / "plain.png", NOISE)
    return folder


def read_whole(grid):
    return grid.read(0, 0, grid.height, grid.width)


def area_average(image, scale):
    """The slow way: the exact integral of every pixel, one axis after the other, in double precision."""

    def axis(values):
        size = values.shape[0]
        total = np.concatenate([np.zeros((1, *values.shape[1:])), np.cumsum(values, axis=0)])
        rows = []
        for i in range(max(1, int(np.floor(size / scale + 0.5)))):
            low, high = min(i * scale, size - 1), min((i + 1) * scale, size)
            edges = []
            for x in (low, high):
                whole = int(x)
                edges.append(total[whole] + (x - whole) * (values[whole] if whole < size else 0))
            rows.append((edges[1] - edges[0]) / (high - low))
        return np.stack(rows)

    return axis(axis(image.astype(np.float64)).swapaxes(0, 1)).swapaxes(0, 1)


# One grid, no seams

NAMES = ("tiled.tif", "strips.tif", "raw.tif", "pyramid.tif", "plain.png")


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), name=st.sampled_from(NAMES), scale=st.sampled_from([1, 2, 3.7, 16]))
def test_windows_that_meet_equal_the_window_of_both(inputs, data, name, scale):
    with open_slide(inputs / name) as slide:
        slide_io_block = data.draw(st.sampled_from([5, 32, 256]))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(slide_io, "BLOCK", slide_io_block)
            grid = slide.grid(reduce=scale)
        top, left = (data.draw(st.integers(0, size - 1)) for size in (grid.height, grid.width))
        height = data.draw(st.integers(1, grid.height - top))
        width = data.draw(st.integers(1, grid.width - left))
        whole = grid.read(top, left, height, width)
        cut = data.draw(st.integers(0, height))
        split = data.draw(st.integers(0, width))
        with open_slide(inputs / name) as again:  # nothing in memory
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(slide_io, "BLOCK", slide_io_block)
                fresh = again.grid(reduce=scale)
            parts = [
                [fresh.read(t, s, h, w) for s, w in ((left, split), (left + split, width - split)) if w]
                for t, h in ((top, cut), (top + cut, height - cut))
                if h
            ]
        np.testing.assert_array_equal(_join(parts), whole)
        np.testing.assert_array_equal(read_whole(grid)[top : top + height, left : left + width], whole)


def _join(parts):
    return np.concatenate([np.concatenate(row, axis=1) for row in parts], axis=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [3.7, 5, 16, 1.01, 211.3])
def test_reduced_pixels_are_area_averages(inputs, name, scale):
    with open_slide(inputs / name) as slide:
        grid = slide.grid(reduce=scale)
        base = max((level for level in slide.levels if level.scale < scale), key=lambda level: level.scale)
        source = NOISE[:: int(base.scale), :: int(base.scale)]
        expected = area_average(source, scale / base.scale)
        result = read_whole(grid)
        assert grid.scale == scale and (grid.height, grid.width) == tuple(
            max(1, int(np.floor(size / scale + 0.5))) for size in NOISE.shape[:2]
        )
        assert np.abs(result - expected[: grid.height, : grid.width]).max() <= 0.51


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("channels", [1, 2, 3, 5])
@pytest.mark.parametrize("factor", [2, 3, 4, 8])
def test_whole_factors_equal_opencv_on_the_whole_image(tmp_path, dtype, channels, factor):
    image = (RNG.random((24 * 17, 24 * 23, channels)) * 255).astype(dtype)
    write_image(tmp_path / "a.tif", image)  # strips
    layout = {} if channels == 1 else {"planarconfig": "contig"}
    values = image[..., 0] if channels == 1 else image
    tifffile.imwrite(tmp_path / "b.tif", values, tile=(64, 64), photometric="minisblack", **layout)
    size = image.shape[1] // factor, image.shape[0] // factor
    planes = [cv2.resize(image[..., c : c + 4], size, interpolation=cv2.INTER_AREA) for c in range(0, channels, 4)]
    for name in "ab":
        with open_slide(tmp_path / f"{name}.tif") as slide:
            result = read_whole(slide.grid(reduce=factor))
        if dtype == np.float32:
            np.testing.assert_allclose(result, np.dstack(planes), rtol=1e-5)
        else:
            np.testing.assert_array_equal(result, np.dstack(planes))


def test_the_pixel_at_the_edge_averages_what_is_there(inputs):
    with open_slide(inputs / "tiled.tif") as slide:
        result = read_whole(slide.grid(reduce=16))  # 303 is 18 * 16 + 15, 417 is 26 * 16 + 1
    assert result.shape == (19, 26, 3)
    assert np.abs(result[18, 0] - NOISE[288:, :16].mean((0, 1))).max() <= 0.51


def test_two_threads_read_what_one_reads(inputs, monkeypatch):
    monkeypatch.setattr(slide_sources, "CACHE_BYTES", 30000)
    monkeypatch.setattr(slide_sources, "WINDOW_ROWS", 1)
    wrong = []
    with open_slide(inputs / "tiled.tif") as slide:
        grid = slide.grid()

        def read(seed):
            rng = np.random.default_rng(seed)
            for _ in range(150):
                top, left = rng.integers(0, 250), rng.integers(0, 350)
                if not np.array_equal(grid.read(top, left, 50, 60), NOISE[top : top + 50, left : left + 60]):
                    wrong.append((top, left))

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_threads_read_several_levels_of_one_file(inputs, monkeypatch):
    monkeypatch.setattr(slide_sources, "CACHE_BYTES", 1)
    monkeypatch.setattr(slide_sources, "WINDOW_ROWS", 1)
    found: dict[tuple[int, int], np.ndarray] = {}
    with open_slide(inputs / "pyramid.tif") as slide:
        grids = [slide.grid(level=level) for level in range(len(slide.levels))]
        expected = [read_whole(grid) for grid in grids]
        assert len(grids) > 1

        def read(number):
            for turn in range(20):
                found[number, turn] = read_whole(grids[number])

        threads = [threading.Thread(target=read, args=(number,)) for number in range(len(grids))]
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
        assert all(not grid.damage for grid in grids)
    assert len(found) == 20 * len(grids)
    assert all(np.array_equal(pixels, expected[number]) for (number, _), pixels in found.items())


def test_rows_of_windows_decode_each_tile_once_in_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(slide_sources, "CACHE_BYTES", 1)
    monkeypatch.setattr(slide_sources, "WINDOW_ROWS", 64)
    image = RNG.integers(0, 256, (640, 320, 3)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", image, tile=(32, 32), compression="zlib")
    calls = []
    decode = slide_sources._TiffLevel._stored
    monkeypatch.setattr(slide_sources._TiffLevel, "_stored", lambda *a: calls.append(a[1:]) or decode(*a))
    with open_slide(tmp_path / "a.tif") as slide:
        grid = slide.grid()
        for top in range(0, 640 - 63, 48):
            for left in range(0, 320 - 63, 32):
                grid.read(top, left, 64, 64)
                assert grid._mosaic._bytes <= 4 * 32 * 320 * 3
    assert len(calls) == len(set(calls)) == 200


# Every file that read_image reads

MORE = {
    "planar_tiles.tif": tiff(
        np.moveaxis(NOISE, 2, 0), photometric="rgb", planarconfig="separate", tile=(64, 64), compression="zlib"
    ),
    "rgba.tif": tiff(np.dstack([NOISE, NOISE[..., 0]]), photometric="rgb", extrasamples=["unassalpha"], tile=(32, 32)),
    "extra.tif": tiff(np.dstack([NOISE, NOISE[..., 0]]), photometric="rgb", extrasamples=["unspecified"]),
    "deep_tiles.tif": tiff(NOISE.astype(np.uint16) * 257, tile=(64, 64), compression="lzw", predictor=True),
    "float_tiles.tif": tiff(NOISE[..., 0].astype(np.float32) / 7, tile=(64, 64), compression="zlib", predictor=3),
    "double.tif": tiff(NOISE[..., 0].astype(np.float64) / 7, rowsperstrip=9),
    "half.tif": tiff(NOISE[..., 0].astype(np.float16)),
    "signed.tif": tiff(NOISE[..., 0].astype(np.int16) - 100, tile=(64, 64)),
    "long.tif": tiff(NOISE[..., 0].astype(np.uint32) * 300, rowsperstrip=10, compression="zlib"),
    "bool.tif": tiff(NOISE[..., 0] > 99, rowsperstrip=10),
    "white.tif": tiff(NOISE[..., 0], photometric="miniswhite", metadata=None, tile=(64, 64)),
    "motorola.tif": tiff(NOISE.astype(np.uint16), byteorder=">", rowsperstrip=8),
    "motorola_tiles.tif": tiff(NOISE.astype(np.uint16), byteorder=">", tile=(64, 64), compression="zlib"),
    "big.tif": tiff(NOISE, bigtiff=True, tile=(64, 64)),
    "band_pages.tif": tiff(np.moveaxis(NOISE, 2, 0), photometric="minisblack", tile=(64, 64), compression="zlib"),
    "cmyk.tif": encode(Image.fromarray(SMOOTH).convert("CMYK"), "TIFF", compression="tiff_lzw"),
    "palette_strips.tif": encode(Image.fromarray(SMOOTH).quantize(9), "TIFF", compression="tiff_lzw"),
    "group4_strips.tif": encode(NOISE[..., 0] > 100, "TIFF", compression="group4"),
    "jpeg_tiles.tif": tiff(SMOOTH, photometric="ycbcr", compression="jpeg", tile=(64, 64), subsampling=(2, 2)),
    "jpeg_rgb.tif": tiff(SMOOTH, photometric="rgb", compression="jpeg", tile=(64, 64)),
    "zstd.tif": tiff(NOISE, compression="zstd", tile=(64, 64)),
    "jpeg2000.tif": tiff(SMOOTH, compression="jpeg2000", tile=(64, 64)),
    "ome.tif": tiff(np.moveaxis(NOISE, 2, 0), ome=True, photometric="minisblack", metadata={"axes": "CYX"}),
    "five.tif": tiff(NOISE[None, None].transpose(0, 1, 4, 2, 3), ome=True, metadata={"axes": "TZCYX"}),
    "sparse.tif": tiff(iter([NOISE[:64, :64], None] * 18), shape=(384, 384, 3), dtype="u1", tile=(64, 64)),
    "one_row.tif": tiff(NOISE[:1], tile=(16, 16)),
    "one_pixel.tif": tiff(NOISE[:1, :1]),
    "one_column.png": encode(NOISE[:, :1], "PNG"),
    "turned.tif": encode(SMOOTH, "TIFF", tiffinfo={274: 6}),
}


@pytest.mark.parametrize("name", [*FILES, *MORE])
def test_values_are_those_of_read_image(tmp_path, name):
    path = put(tmp_path, name, {**FILES, **MORE}[name])
    expected = read_image(path)
    with open_slide(path) as slide:
        grid = slide.grid()
        image = read_whole(grid)
        assert (slide.height, slide.width, slide.channels) == expected.shape == image.shape
        assert image.dtype == slide.dtype == grid.dtype
        assert image.dtype == expected.dtype or (image.dtype == np.float32 and expected.dtype.kind == "u")
        np.testing.assert_array_equal(image, expected)
        assert grid.valid(0, 0, grid.height, grid.width) is None and grid.damage == []
        rows, columns = slice(slide.height // 3, None), slice(slide.width // 3, None)
        part = grid.read(rows.start, columns.start, slide.height - rows.start, slide.width - columns.start)
        np.testing.assert_array_equal(part, expected[rows, columns])


@pytest.mark.parametrize(
    ("dtype", "text"), [(np.uint8, "0"), (np.int16, "-5"), (np.float32, "nan"), (np.float32, "-3.40282e+38")]
)
@pytest.mark.parametrize(
    "options", [{"tile": (16, 16)}, {"rowsperstrip": 5}, {"tile": (16, 16), "compression": "zlib"}]
)
def test_pixels_without_data_are_those_of_the_data_set(tmp_path, dtype, text, options):
    values = RNG.integers(1, 200, (45, 50, 3)).astype(dtype)
    values[10:30, 20:40] = np.float32(text) if text != "-3.40282e+38" else np.finfo(np.float32).min
    values[0, 0, 0] = 0
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb", extratags=[(42113, "s", 0, text, True)], **options)
    image, valid = read_layer(tmp_path / "a.tif", [])
    with open_slide(tmp_path / "a.tif") as slide:
        grid = slide.grid()
        np.testing.assert_array_equal(read_whole(grid), image)
        np.testing.assert_array_equal(grid.valid(0, 0, 45, 50), valid)
        assert slide.nodata == pytest.approx(float(text), nan_ok=True)
        assert grid.valid(0, 0, 10, 50) is None
        np.testing.assert_array_equal(grid.valid(8, 18, 12, 12), valid[8:20, 18:30])
        coarse = slide.grid(reduce=4)
        known = coarse.valid(0, 0, coarse.height, coarse.width)
        shares = area_average(valid[..., None].astype(float), 4)[..., 0]
        np.testing.assert_array_equal(known, shares >= 0.5)
        means = area_average(np.where(valid[..., None], image, 0), 4)
        expected = np.where(known[..., None], means / np.maximum(shares, 1e-9)[..., None], 0)
        np.testing.assert_allclose(read_whole(coarse), expected, atol=0.51 if dtype == np.uint8 else 1e-3)


# Levels and scales


@pytest.mark.parametrize("subifds", [False, True])
@pytest.mark.parametrize("options", [{"tile": (32, 32), "compression": "zlib"}, {"rowsperstrip": 11}])
def test_levels_of_a_pyramid_are_read_as_stored(tmp_path, subifds, options):
    write_pyramid(tmp_path / "a.tif", NOISE, (1, 2, 4, 16), subifds=subifds, **options)
    with open_slide(tmp_path / "a.tif") as slide:
        assert [(e.height, e.width, e.scale) for e in slide.levels] == [
            (303, 417, 1),
            (152, 209, 2),
            (76, 105, 4),
            (19, 27, 16),
        ]
        for index, step in enumerate((1, 2, 4, 16)):
            for grid in (slide.grid(level=index), slide.grid(reduce=step * 1.004)):
                assert grid.scale == step
                np.testing.assert_array_equal(read_whole(grid), NOISE[::step, ::step])
        coarse = slide.grid(reduce=8)  # from level 2
        averages = area_average(NOISE[::4, ::4], 2)[: coarse.height, : coarse.width]
        assert np.abs(read_whole(coarse) - averages).max() <= 0.51


def test_levels_of_bands_in_pages_of_their_own(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        for step in (1, 2):
            for band in range(3):
                writer.write(NOISE[::step, ::step, band], metadata=None, subfiletype=int(step > 1), tile=(32, 32))
    with open_slide(tmp_path / "a.tif") as slide:
        np.testing.assert_array_equal(read_whole(slide.grid(level=1)), NOISE[::2, ::2])
    with tifffile.TiffWriter(tmp_path / "b.ome.tif") as writer:
        bands = np.moveaxis(NOISE, 2, 0)
        writer.write(bands, subifds=1, photometric="minisblack", tile=(32, 32), metadata={"axes": "CYX"})
        writer.write(bands[:, ::2, ::2], subfiletype=1, photometric="minisblack", tile=(32, 32))
    with open_slide(tmp_path / "b.ome.tif") as slide:
        assert slide.channels == 3
        np.testing.assert_array_equal(read_whole(slide.grid()), NOISE)
        np.testing.assert_array_equal(read_whole(slide.grid(level=1)), NOISE[::2, ::2])


def test_label_macro_and_thumbnail_are_no_levels(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.svs") as writer:
        words = "Aperio Image Library v11\n417x303 [0,0 417x303] (32x32) |AppMag = 20|MPP = 0.2510|User = J. Doe"
        writer.write(NOISE, tile=(32, 32), description=words, metadata=None)
        writer.write(NOISE[::3, ::3], rowsperstrip=16, description="Aperio Image Library v11\n thumb", metadata=None)
        writer.write(NOISE[::4, ::4], tile=(32, 32), description="Aperio Image Library v11\n 1/4", metadata=None)
        writer.write(NOISE[::2, ::2], subfiletype=1, rowsperstrip=16, description="Aperio\nlabel", metadata=None)
        writer.write(NOISE[::2, ::2], subfiletype=9, rowsperstrip=16, description="Aperio\nmacro", metadata=None)
    with open_slide(tmp_path / "a.svs") as slide:
        assert [level.scale for level in slide.levels] == [1, 4]
        assert slide.mpp == 0.251 and slide.grid(mpp=1.004).scale == 4
        assert slide.grid(mpp=0.502).mpp == pytest.approx(0.502)
        np.testing.assert_array_equal(read_whole(slide.grid(level=1)), NOISE[::4, ::4])


def test_masks_beside_the_levels_are_left_out(tmp_path):
    grey = NOISE[..., 0]
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        for step in (1, 2):
            reduced, small = int(step > 1), grey[::step, ::step]
            writer.write(small, tile=(32, 32), metadata=None, subfiletype=reduced)
            writer.write(small > 9, tile=(32, 32), metadata=None, subfiletype=4 + reduced, photometric="mask")
    with open_slide(tmp_path / "a.tif") as slide:
        assert slide.channels == 1
        np.testing.assert_array_equal(read_whole(slide.grid(level=1))[..., 0], grey[::2, ::2])


def test_pages_of_other_pictures_are_no_levels(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        writer.write(NOISE, tile=(32, 32), metadata=None)
        writer.write(NOISE[:100, :400], tile=(32, 32), metadata=None, subfiletype=1)  # another shape
        writer.write(NOISE[::2, ::2, 0], tile=(32, 32), metadata=None, subfiletype=1)  # grey
        writer.write(NOISE[::-1], tile=(32, 32), metadata=None, subfiletype=1)  # as large
    with open_slide(tmp_path / "a.tif") as slide:
        assert len(slide.levels) == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"resolution": (20000, 40000), "resolutionunit": "CENTIMETER"}, (0.5, 0.25)),
        ({"resolution": (25400, 25400), "resolutionunit": "INCH"}, (1.0, 1.0)),
        ({"resolution": (72, 72), "resolutionunit": "INCH"}, None),
        ({"resolution": (2, 2), "resolutionunit": "NONE"}, None),
        ({}, None),
        ({"ome": True, "metadata": {"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.25}}, (0.5, 0.25)),
        (
            {
                "ome": True,
                "metadata": {
                    "PhysicalSizeX": 500,
                    "PhysicalSizeXUnit": "nm",
                    "PhysicalSizeY": 0.001,
                    "PhysicalSizeYUnit": "mm",
                },
            },
            (0.5, 1.0),
        ),
        ({"imagej": True, "resolution": (2, 2), "metadata": {"unit": "um"}}, (0.5, 0.5)),
    ],
)
def test_microns_per_pixel(tmp_path, options, expected):
    tifffile.imwrite(tmp_path / "a.tif", NOISE, **options)
    with open_slide(tmp_path / "a.tif") as slide:
        assert slide.mpp_xy == (None if expected is None else pytest.approx(expected))
        assert slide.mpp == (None if expected is None else pytest.approx(sum(expected) / 2))


def test_scales_that_cannot_be_given(inputs):
    with open_slide(inputs / "pyramid.tif") as slide:
        with pytest.raises(SlideError, match="does not say how many microns.*--reduce or --level"):
            slide.grid(mpp=1.0)
        for level in (3, -1):
            with pytest.raises(
                SlideError, match=rf"no level {level}; expected one of: 0 \(303x417, 1/1\), 1 \(152x209"
            ):
                slide.grid(level=level)
        for reduce in (0.5, 0, -3, float("nan"), float("inf")):
            with pytest.raises(SlideError, match="nothing is finer than its full resolution; expected a reduction"):
                slide.grid(reduce=reduce)
        with pytest.raises(ValueError, match="one of reduce, level and mpp"):
            slide.grid(reduce=2, level=1)
        for fill in (256, -1, (1, 2), float("nan")):
            with pytest.raises(ValueError, match="fill .* does not fit .*pyramid.tif; expected one number or 3"):
                slide.grid(fill=fill)
        grid = slide.grid(reduce=2)
        for window in ((0, 0, 153, 1), (-1, 0, 1, 1), (0, 209, 1, 1), (0, 0, 0, 1)):
            with pytest.raises(ValueError, match="leaves the grid of .*pyramid.tif, which is 152x209"):
                grid.read(*window)
            with pytest.raises(ValueError, match="leaves the grid"):
                grid.valid(*window)


def test_tiny_pictures_at_any_scale(tmp_path):
    for height, width in ((1, 1), (1, 9), (9, 1), (3, 2)):
        write_image(tmp_path / "a.png", NOISE[:height, :width])
        tifffile.imwrite(tmp_path / "a.tif", NOISE[:height, :width], tile=(16, 16))
        for name in ("a.png", "a.tif"):
            with open_slide(tmp_path / name) as slide:
                for scale in (1, 1.3, 2, 3.7, 50):
                    grid = slide.grid(reduce=scale)
                    expected = area_average(NOISE[:height, :width], grid.scale)
                    np.testing.assert_allclose(read_whole(grid), expected[: grid.height, : grid.width], atol=0.51)


# Damage


def spoil(path, index, page=0):
    """Overwrite one segment with bytes that no decoder takes."""
    with tifffile.TiffFile(path) as tif:
        start, count = tif.pages[page].dataoffsets[index], tif.pages[page].databytecounts[index]
    with path.open("r+b") as handle:
        handle.seek(start)
        handle.write(b"\xff" * count)


@pytest.mark.parametrize("fill", [0, 7, (1, 2, 3)])
def test_a_damaged_tile_is_named_once_and_the_rest_read(tmp_path, fill):
    path = tmp_path / "срез.tif"
    tifffile.imwrite(path, SMOOTH, tile=(64, 64), compression="zlib")
    spoil(path, 9)  # row 1, column 2 of 7
    expected, hole = SMOOTH.copy(), np.s_[64:128, 128:192]
    expected[hole] = fill
    with open_slide(path) as slide:
        grid = slide.grid(fill=fill)
        for _ in range(2):
            np.testing.assert_array_equal(read_whole(grid), expected)
        valid = np.ones(SMOOTH.shape[:2], bool)
        valid[hole] = False
        np.testing.assert_array_equal(grid.valid(0, 0, 303, 417), valid)
        assert grid.valid(0, 0, 64, 417) is None
        (message,) = grid.damage
        assert str(path) in message and "level 0" in message
        assert "row 1, column 2 (pixel rows 64 to 127, columns 128 to 191) is damaged" in message
        for scale in (2, 3.7, 16):
            coarse = slide.grid(reduce=scale, fill=fill)
            known = coarse.valid(0, 0, coarse.height, coarse.width)
            shares = area_average(valid[..., None].astype(float), scale)[: coarse.height, : coarse.width, 0]
            np.testing.assert_array_equal(
                known[np.abs(shares - 0.5) > 1e-6], shares[np.abs(shares - 0.5) > 1e-6] >= 0.5
            )
            means = area_average(SMOOTH * valid[..., None], scale)[: coarse.height, : coarse.width]
            means = np.where(known[..., None], means / np.maximum(shares, 1e-9)[..., None], fill)
            np.testing.assert_allclose(read_whole(coarse), means, atol=0.51)
            assert coarse.damage == [message]


def test_valid_needs_no_read_before(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", SMOOTH, tile=(64, 64), compression="zlib")
    spoil(tmp_path / "a.tif", 0)
    with open_slide(tmp_path / "a.tif") as slide:
        grid = slide.grid()
        assert not grid.valid(10, 10, 20, 20).any()
        assert len(grid.damage) == 1


@pytest.mark.parametrize("options", [{"tile": (64, 64)}, {"rowsperstrip": 16, "compression": "zlib"}, {}])
def test_tiles_beyond_the_end_of_a_cut_file_are_damaged(tmp_path, options, monkeypatch):
    monkeypatch.setattr(slide_sources, "RAW_BYTES", 417 * 3 * 10)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, NOISE, **options)
    os.truncate(path, path.stat().st_size * 2 // 3)
    with open_slide(path) as slide:
        grid = slide.grid(fill=9)
        image, valid = read_whole(grid), grid.valid(0, 0, 303, 417)
        assert 0.5 < valid.mean() < 0.75
        np.testing.assert_array_equal(image[valid], NOISE[valid])
        assert (image[~valid] == 9).all()
        assert all("lie beyond the end" in message and str(path) in message for message in grid.damage)


def test_not_finite_values_damage_their_tile_alone(tmp_path):
    values = SMOOTH[..., 0].astype(np.float32)
    values[70, 70] = np.nan
    tifffile.imwrite(tmp_path / "a.tif", values, tile=(64, 64))
    with open_slide(tmp_path / "a.tif") as slide:
        grid = slide.grid()
        assert np.count_nonzero(~grid.valid(0, 0, 303, 417)) == 64 * 64
        assert "NaN or infinity in 1 pixels" in grid.damage[0]
        assert not read_whole(grid)[64:128, 64:128].any()


def test_the_only_strip_of_a_file_is_the_whole_picture(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", SMOOTH, compression="zlib", rowsperstrip=303)
    spoil(tmp_path / "a.tif", 0)
    with open_slide(tmp_path / "a.tif") as slide, pytest.raises(SlideError, match="a.tif is damaged"):
        read_whole(slide.grid())


@pytest.mark.parametrize("name", [*FILES, *MORE])
def test_a_file_cut_anywhere_is_refused_or_its_damage_known(tmp_path, name, capfd):
    whole = {**FILES, **MORE}[name]
    expected = read_image(put(tmp_path, name, whole))
    for cut in sorted({*range(1, len(whole), max(1, len(whole) // 9)), len(whole) - 1, len(whole) - 7}):
        path = put(tmp_path, name, whole[:cut])
        try:
            with open_slide(path) as slide:
                grid = slide.grid()
                image, valid = read_whole(grid), grid.valid(0, 0, slide.height, slide.width)
        except SlideError as error:
            assert str(path) in str(error)
            continue
        assert (valid is None) == (not grid.damage)
        sound = np.ones(image.shape[:2], bool) if valid is None else valid
        np.testing.assert_array_equal(image[sound], expected[sound])


def test_damaged_bytes_never_raise_anything_but_slide_error(tmp_path, capfd):
    rng = np.random.default_rng(1)
    for name, whole in {**FILES, **MORE}.items():
        for _ in range(5):
            data = bytearray(whole)
            for position in rng.integers(0, min(len(data), 400), 3):
                data[position] = rng.integers(0, 256)
            try:
                with open_slide(put(tmp_path, name, bytes(data)), max_decoded_gb=0.1) as slide:
                    grid = slide.grid()
                    grid.read(0, 0, min(grid.height, 500), min(grid.width, 500))
            except SlideError as error:
                assert name in str(error)


# Files that are refused


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("notes.txt", b"These are my notes.", "not an image .* expected PNG"),
        ("empty.tif", b"", "empty"),
        ("rgb_pages.tif", tiff(np.stack([NOISE, NOISE]), photometric="rgb"), "2 pages of 3 channels"),
        ("z.ome.tif", tiff(np.zeros((4, 9, 9), np.uint8), ome=True, metadata={"axes": "ZYX"}), "4 slices.*Z = 1"),
        (
            "t.ome.tif",
            tiff(np.zeros((2, 3, 9, 9), "u1"), ome=True, metadata={"axes": "TCYX"}),
            "2 points in time.*T = 1",
        ),
        ("zj.tif", tiff(np.zeros((2, 5, 9, 9), "u1"), imagej=True, metadata={"axes": "TZYX"}), "dimension T"),
        ("complex.tif", tiff(np.zeros((9, 9), np.complex64), tile=(16, 16)), "complex64"),
        ("lab.tif", tiff(NOISE, photometric="cielab", tile=(16, 16)), "colour type"),
    ],
)
def test_files_that_are_no_picture(tmp_path, name, data, message):
    path = put(tmp_path, name, data)
    with pytest.raises(SlideError, match=message) as caught:
        open_slide(path)
    assert str(path) in str(caught.value)


def test_folders_and_missing_files(tmp_path):
    with pytest.raises(SlideError, match="is a folder; expected an image file"):
        open_slide(tmp_path)
    for name in ("none.tif", "none.mrxs"):
        with pytest.raises(FileNotFoundError, match=name):
            open_slide(tmp_path / name)
    assert issubclass(SlideError, ImageError)


def rename_compression(path, code):
    """Write another number into the compression tags of a little-endian file."""
    data = path.read_bytes()
    (found,) = set(re.findall(re.escape(struct.pack("<HHI", 259, 3, 1)) + b"..", data, re.DOTALL))
    path.write_bytes(data.replace(found, found[:-2] + struct.pack("<H", code)))


def test_an_unknown_compression_names_packages_once(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", NOISE, tile=(64, 64), compression="zlib")
    rename_compression(tmp_path / "a.tif", 12345)
    with pytest.raises(SlideError, match=r"a\.tif.*compression.*pip install -U imagecodecs.*openslide-bin"):
        open_slide(tmp_path / "a.tif")


def test_a_missing_decoder_is_no_damaged_tile(tmp_path, monkeypatch):
    tifffile.imwrite(tmp_path / "a.tif", NOISE, tile=(64, 64), compression="zlib")

    def missing(*_):
        raise ImportError("could not import name 'zlib_decode'")

    monkeypatch.setattr(slide_sources._TiffLevel, "_stored", missing)
    with open_slide(tmp_path / "a.tif") as slide:
        grid = slide.grid()
        with pytest.raises(SlideError, match=r"a\.tif needs a decoder.*zlib_decode.*pip install -U imagecodecs"):
            grid.read(0, 0, 9, 9)
        assert grid.damage == []


def test_aperio_jpeg_2000_needs_openslide(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", NOISE, tile=(64, 64), compression="zlib")
    rename_compression(tmp_path / "a.tif", 33003)
    with pytest.raises(SlideError, match=r"a\.tif: JPEG 2000.*pip install openslide-python openslide-bin"):
        open_slide(tmp_path / "a.tif")


def test_formats_of_openslide_without_it(tmp_path, monkeypatch):
    put(tmp_path, "a.mrxs", FILES["rgb.jpg"])
    with pytest.raises(SlideError, match=r"a\.mrxs cannot be read by OpenSlide"):
        open_slide(tmp_path / "a.mrxs")
    monkeypatch.setattr(slide_sources, "_import_openslide", lambda: None)
    with pytest.raises(SlideError, match=r"a\.mrxs.*pip install openslide-python openslide-bin"):
        open_slide(tmp_path / "a.mrxs")


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.png", encode(NOISE, "PNG")),
        ("a.jpg", encode(NOISE, "JPEG")),
        ("a.gif", encode(Image.fromarray(NOISE).quantize(8), "GIF")),
        ("a.bmp", encode(NOISE, "BMP")),
        ("a.webp", encode(NOISE, "WEBP")),
        ("strip.tif", tiff(NOISE, compression="zlib", rowsperstrip=303)),
        ("turned.tif", encode(NOISE, "TIFF", tiffinfo={274: 6})),
    ],
)
def test_what_is_too_large_to_decode_at_once_names_the_conversion(tmp_path, name, data, monkeypatch):
    path = put(tmp_path, name, data)
    size = 303 * 417 * 3 / 1e9
    open_slide(path, max_decoded_gb=size * 1.01).close()
    with monkeypatch.context() as patch:
        patch.setattr(slide_sources, "read_image", None)  # refused before it is decoded
        with pytest.raises(SlideError, match=rf"{name}.* at once .*303x417.*--max-decoded-gb.*vips tiffsave .*--tile"):
            open_slide(path, max_decoded_gb=size * 0.99)


def test_tiles_are_not_bound_by_the_limit(inputs):
    for name in ("tiled.tif", "strips.tif", "raw.tif", "pyramid.tif"):
        with open_slide(inputs / name, max_decoded_gb=1e-4) as slide:
            np.testing.assert_array_equal(read_whole(slide.grid()), NOISE)


# Maps

SCALE_TAGS = ((33550, 12, 3, (0.5, 0.25, 0.0), True), (33922, 12, 6, (2.0, 4.0, 0.0, 1000.0, 2000.0, 0.0), True))
POINT = (34735, 3, 8, (1, 1, 0, 1, 1025, 0, 1, 2), True)
AREA = (34735, 3, 8, (1, 1, 0, 1, 1025, 0, 1, 1), True)
MATRIX = (34264, 12, 16, (0.5, 0.1, 0, 1000.0, 0.2, -0.25, 0, 2000.0, 0, 0, 0, 0, 0, 0, 0, 1.0), True)


@pytest.mark.parametrize("tags", [SCALE_TAGS, (*SCALE_TAGS, AREA), (*SCALE_TAGS, POINT), (MATRIX,), (MATRIX, POINT)])
@pytest.mark.parametrize("factor", [1, 2, 3.7])
def test_corners_stay_in_their_place_on_the_map(tmp_path, tags, factor):
    tifffile.imwrite(tmp_path / "a.tif", NOISE, extratags=tags)
    with open_slide(tmp_path / "a.tif") as slide:
        geo = slide.geo
    a, b, c, d, e, f = geo.affine()
    coarse = Georeference(tuple(geo.scaled(factor))).affine()
    np.testing.assert_allclose(coarse, (a * factor, b * factor, c, d * factor, e * factor, f), rtol=1e-12)
    if AREA in tags or tags == SCALE_TAGS:
        assert (a * 2 + b * 4 + c, d * 2 + e * 4 + f) == (1000, 2000) and (a, e) == (0.5, -0.25)
    tifffile.imwrite(tmp_path / "b.tif", NOISE, extratags=geo.scaled(1))
    with open_slide(tmp_path / "b.tif") as slide:
        assert slide.geo.affine() == pytest.approx((a, b, c, d, e, f))


def test_control_points_alone_have_no_affine(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", NOISE, extratags=SCALE_TAGS[1:])
    with open_slide(tmp_path / "a.tif") as slide:
        assert slide.geo.affine() is None
        assert slide.geo.scaled(2)[0][3] == (1.0, 2.0, 0.0, 1000.0, 2000.0, 0.0)
    with open_slide(put(tmp_path, "b.tif", FILES["plain.tif"])) as slide:
        assert slide.geo is None


# Real slides


@real
def test_a_real_slide_equals_openslide():
    openslide = pytest.importorskip("openslide")
    path = DATA / "slides" / "CMU-1-Small-Region.svs"
    with open_slide(path) as slide, openslide.OpenSlide(str(path)) as peer:
        assert (slide.width, slide.height) == peer.dimensions and len(slide.levels) == peer.level_count
        assert slide.mpp == pytest.approx(float(peer.properties["openslide.mpp-x"]))
        grid = slide.grid()
        for top, left in ((0, 0), (1000, 777), (2967 - 300, 2220 - 300)):
            expected = np.asarray(peer.read_region((left, top), 0, (300, 300)).convert("RGB"))
            assert np.abs(grid.read(top, left, 300, 300).astype(int) - expected).max() <= 2
        forced = slide_io.Slide(path, slide_sources._open_openslide(path, "it"))
        assert np.abs(read_whole(forced.grid()).astype(int) - read_whole(grid)).max() <= 2
        forced.close()


@real
def test_a_real_pyramid_equals_openslide():
    openslide = pytest.importorskip("openslide")
    path = DATA / "slides" / "openslide_boxes.tiff"
    with open_slide(path) as slide, openslide.OpenSlide(str(path)) as peer:
        assert [(e.width, e.height) for e in slide.levels] == list(peer.level_dimensions)
        for index, size in enumerate(peer.level_dimensions):
            expected = np.asarray(peer.read_region((0, 0), index, size).convert("RGB"))
            np.testing.assert_array_equal(read_whole(slide.grid(level=index)), expected)


class StickySlide:
    """A slide of OpenSlide with a damaged region: a handle that met it says so of every region from then on."""

    level_dimensions, level_downsamples, properties = ((1024, 512), (512, 256)), (1.0, 2.0), {}

    def __init__(self, path):
        self.failed = False

    def read_region(self, corner, level, size):
        self.failed |= (corner, level) == ((512, 0), 0)
        if self.failed:
            raise ValueError("broken tile")
        return np.full((size[1], size[0], 4), (level + 1, 7, 7, 255), np.uint8)


def test_a_damaged_region_of_openslide_damages_no_other():
    class Library:
        OpenSlide, OpenSlideError, PROPERTY_NAME_BACKGROUND_COLOR = StickySlide, ValueError, "background"

    handle = StickySlide("a.mrxs")
    levels = [slide_sources._OpenSlideLevel(Library, handle, "a.mrxs", index).mosaic() for index in (0, 1)]
    fill = np.array([9, 9, 9], np.uint8)
    large = levels[0].read(0, 0, 512, 1024, fill)
    assert (large[:, :512] == (1, 7, 7)).all() and (large[:, 512:] == 9).all() and len(levels[0].damage) == 1
    assert (levels[1].read(0, 0, 256, 512, fill) == (2, 7, 7)).all() and not levels[1].damage


def test_a_handle_that_was_opened_anew_is_closed_with_the_slide(tmp_path, monkeypatch):
    opened, closed = [], []

    class Counted(StickySlide):
        level_count = 2

        def __init__(self, path):
            super().__init__(path)
            opened.append(self)

        def close(self):
            assert self not in closed, "OpenSlide takes no second close"
            closed.append(self)

    class Library:
        OpenSlide, OpenSlideError, PROPERTY_NAME_BACKGROUND_COLOR = Counted, ValueError, "background"
        PROPERTY_NAME_MPP_X = PROPERTY_NAME_MPP_Y = "mpp"

    monkeypatch.setattr(slide_sources, "_import_openslide", lambda: Library)
    (tmp_path / "a.mrxs").write_bytes(b"")
    with open_slide(tmp_path / "a.mrxs") as slide:
        grid = slide.grid(fill=9)
        assert (grid.read(0, 0, 512, 1024)[:, 512:] == 9).all() and len(opened) > 1 and not closed
    assert opened[0] in closed and opened[-1] in closed
