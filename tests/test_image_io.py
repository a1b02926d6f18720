import errno
import io
import os
import re
import struct
import subprocess
import sys
import textwrap
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps

import image_io
from image_io import ImageError, read_image, read_mask, read_orientation, read_valid, write_image, write_mask

ROOT = Path(__file__).resolve().parent.parent
RNG = np.random.default_rng(0)
RGB = cv2.GaussianBlur(RNG.integers(0, 256, (40, 37, 3)).astype(np.uint8), (5, 5), 0)
GREY = np.ascontiguousarray(RGB[..., 0])
PALETTE = Image.fromarray(RGB).quantize(16)


def encode(picture, kind, **options):
    buffer = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(buffer, kind, **options)
    return buffer.getvalue()


def tiff(values, **options):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, **options)
    return buffer.getvalue()


def put(folder, name, data):
    path = folder / name
    path.write_bytes(data)
    return path


def grey_png(bits, rows, width):
    """A grey PNG of 1, 2 or 4 bits, which PIL cannot write."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, len(rows), bits, 0, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


FILES = {
    "rgb.png": encode(RGB, "PNG"),
    "rgba.png": encode(np.dstack([RGB, GREY]), "PNG"),
    "palette.png": encode(PALETTE, "PNG"),
    "bilevel.png": encode(GREY > 100, "PNG"),
    "deep.png": encode(GREY.astype(np.uint16) * 257, "PNG"),
    "rgb.jpg": encode(RGB, "JPEG"),
    "grey.jpg": encode(GREY, "JPEG"),
    "progressive.jpg": encode(RGB, "JPEG", progressive=True),
    "cmyk.jpg": encode(Image.fromarray(RGB).convert("CMYK"), "JPEG"),
    "rgb.bmp": encode(RGB, "BMP"),
    "palette.bmp": encode(PALETTE, "BMP"),
    "lossy.webp": encode(RGB, "WEBP"),
    "alpha.webp": encode(np.dstack([RGB, GREY]), "WEBP", lossless=True),
    "palette.gif": encode(PALETTE, "GIF"),
    "grey.gif": encode(GREY, "GIF"),
    "plain.tif": tiff(RGB),
    "lzw.tif": tiff(RGB, compression="lzw", predictor=True),
    "tiles.tif": tiff(RGB, tile=(16, 16), compression="zlib"),
    "planar.tif": tiff(np.moveaxis(RGB, 2, 0), photometric="rgb", planarconfig="separate"),
    "pages.tif": tiff(np.stack([GREY] * 3), photometric="minisblack"),
    "imagej.tif": tiff(np.stack([GREY] * 3), imagej=True, truncate=True),
    "jpeg.tif": tiff(RGB, photometric="ycbcr", compression="jpeg"),
    "libtiff.tif": encode(RGB, "TIFF", compression="tiff_lzw"),
    "group4.tif": encode(GREY > 100, "TIFF", compression="group4"),
    "palette.tif": encode(PALETTE, "TIFF"),
    "float.tif": tiff(GREY.astype(np.float32)),
}


@pytest.mark.parametrize("name", [n for n in FILES if n not in ("pages.tif", "imagej.tif", "float.tif", "deep.png")])
def test_images_equal_what_pil_reads(tmp_path, name):
    path = put(tmp_path, name, FILES[name])
    picture = Image.open(path)
    expected = np.asarray(picture.convert("L" if picture.mode in ("1", "L") else "RGB"))
    image = read_image(path)
    assert image.dtype == np.uint8 and image.flags.c_contiguous and image.flags.writeable
    assert image.shape == (40, 37, 1 if expected.ndim == 2 else 3)
    np.testing.assert_allclose(np.squeeze(image).astype(int), expected, atol=1 if name == "jpeg.tif" else 0)


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_anywhere_is_refused_or_complete(tmp_path, name, capfd):
    whole = FILES[name]
    expected = read_image(put(tmp_path, name, whole))
    cuts = {*range(1, len(whole), max(1, len(whole) // 25)), *range(len(whole) - 12, len(whole))}
    refused = 0
    for cut in sorted(cuts):
        path = put(tmp_path, name, whole[:cut])
        try:
            np.testing.assert_array_equal(read_image(path), expected)
        except ImageError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused >= len(cuts) // 2


@pytest.mark.parametrize("read", [read_image, read_mask, read_valid, read_orientation])
def test_damaged_bytes_never_raise_anything_but_image_error(tmp_path, read, capfd):
    rng = np.random.default_rng(1)
    for name, whole in FILES.items():
        for _ in range(8):
            data = bytearray(whole)
            for position in rng.integers(0, min(len(data), 400), 3):
                data[position] = rng.integers(0, 256)
            try:
                read(put(tmp_path, name, bytes(data)))
            except ImageError as error:
                assert name in str(error)


@pytest.mark.parametrize("read", [read_image, read_mask, read_valid, read_orientation])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"These are my notes.", r"not an image .* starts with b'These are my'; expected PNG"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (b"\x89PNG\r\n\x1a\n\0\0", "truncated"),
    ],
)
def test_what_is_no_image_is_named(tmp_path, read, data, message):
    path = put(tmp_path, "снимок 1.png", data)
    if read is read_valid and data.startswith(b"\x89PNG"):
        assert read_valid(path) is None
        return
    with pytest.raises(ImageError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value)


def test_missing_file_and_folder_in_place_of_a_file(tmp_path):
    for read in (read_image, read_mask, read_valid, read_orientation):
        with pytest.raises(FileNotFoundError, match=r"none\.png"):
            read(tmp_path / "none.png")
        with pytest.raises(OSError, match=re.escape(str(tmp_path))):
            read(tmp_path)


def test_content_decides_not_the_suffix(tmp_path):
    np.testing.assert_array_equal(read_image(put(tmp_path, "a.png", encode(RGB, "BMP"))), RGB)
    np.testing.assert_array_equal(read_image(put(tmp_path, "a.jpg", tiff(RGB))), RGB)


def test_animations_are_refused(tmp_path):
    frames = [Image.fromarray(RGB), Image.fromarray(RGB[::-1].copy())]
    for kind in ("GIF", "WEBP", "PNG"):
        path = put(tmp_path, f"a.{kind}", encode(frames[0], kind, save_all=True, append_images=frames[1:]))
        with pytest.raises(ImageError, match="animation"):
            read_image(path)


@pytest.mark.parametrize(("channels", "dtype"), [(1, np.uint8), (3, np.uint8), (1, np.uint16), (3, np.uint16)])
def test_png_keeps_depth_and_channel_order(tmp_path, channels, dtype):
    image = RNG.integers(0, np.iinfo(dtype).max, (9, 7, channels)).astype(dtype)
    write_image(tmp_path / "новая папка" / "a.png", image)
    back = read_image(tmp_path / "новая папка" / "a.png")
    assert back.dtype == dtype
    np.testing.assert_array_equal(back, image)


def test_grey_with_alpha_is_one_channel(tmp_path):
    path = put(tmp_path, "a.png", encode(Image.fromarray(np.dstack([GREY, GREY // 2]), "LA"), "PNG"))
    np.testing.assert_array_equal(read_image(path)[..., 0], GREY)
    np.testing.assert_array_equal(read_mask(path), GREY)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_is_undone_as_pil_does(tmp_path, kind, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    options = {"tiffinfo": exif} if kind == "TIFF" else {"exif": exif}
    path = put(tmp_path, "a.bin", encode(RGB, kind, **options))
    assert read_orientation(path) == orientation
    expected = np.asarray(ImageOps.exif_transpose(Image.open(path)))
    image = read_image(path)
    assert image.flags.c_contiguous
    np.testing.assert_array_equal(image, expected)


def test_orientation_of_masks_and_of_the_nodata_map(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    mask = read_mask(put(tmp_path, "a.png", encode(GREY, "PNG", exif=exif)))
    np.testing.assert_array_equal(mask, np.rot90(GREY, 3))
    extra = [(274, "H", 1, 6, True), (42113, "s", 0, "7", True)]
    values = np.arange(12, dtype=np.uint8).reshape(3, 4)
    valid = read_valid(put(tmp_path, "a.tif", tiff(values, extratags=extra)))
    assert valid is not None
    np.testing.assert_array_equal(valid, np.rot90(values != 7, 3))


@pytest.mark.parametrize(
    "block", [b"", b"II", b"XX*\0\x08\0\0\0\1\0", b"II*\0\xff\xff\xff\x7f\0\0", b"MM\0*\0\0\0\x08\xff\xff"]
)
def test_broken_exif_counts_as_upright(tmp_path, block):
    assert read_orientation(put(tmp_path, "a.jpg", encode(RGB, "JPEG", exif=b"Exif\0\0" + block))) == 1


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_grey_png_of_few_bits(tmp_path, bits):
    path = put(tmp_path, "a.png", grey_png(bits, [bytes([0b00011011])], 8 // bits))
    stored = np.unpackbits(np.array([0b00011011], np.uint8)).reshape(-1, bits) @ (2 ** np.arange(bits)[::-1])
    np.testing.assert_array_equal(read_mask(path)[0], stored)
    np.testing.assert_array_equal(read_image(path)[0, :, 0], stored * (255 // (2**bits - 1)))


@pytest.mark.parametrize("name", ["palette.png", "palette.gif", "palette.bmp", "palette.tif"])
def test_palette_masks_give_indices(tmp_path, name):
    path = put(tmp_path, name, FILES[name])
    mask = read_mask(path)
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, np.asarray(Image.open(path)))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "GIF"])
def test_one_bit_masks(tmp_path, kind):
    options = {"compression": "group4"} if kind == "TIFF" else {}
    path = put(tmp_path, "a.bin", encode(GREY > 100, kind, **options))
    top = 255 if kind == "GIF" else 1  # PIL writes a GIF with 0 and 255
    np.testing.assert_array_equal(read_mask(path), (GREY > 100) * np.uint8(top))
    np.testing.assert_array_equal(read_image(path)[..., 0], (GREY > 100) * np.uint8(255))


def test_one_bit_palette_tiff(tmp_path):
    colours = np.array([[0, 65535], [0, 0], [0, 0]], np.uint16)
    private = [(65000, "H", 6, colours.ravel().tolist(), True)]  # the writer refuses 1-bit palettes: renamed below
    data = tiff(GREY > 100, photometric="minisblack", extratags=private)
    data = data.replace(struct.pack("<HHI", 65000, 3, 6), struct.pack("<HHI", 320, 3, 6))
    data = data.replace(struct.pack("<HHII", 262, 3, 1, 1), struct.pack("<HHII", 262, 3, 1, 3))
    path = put(tmp_path, "a.tif", data)
    np.testing.assert_array_equal(read_mask(path), GREY > 100)
    np.testing.assert_array_equal(read_image(path), (GREY > 100)[..., None] * np.array([255, 0, 0], np.uint8))


def test_white_is_zero(tmp_path):
    path = put(tmp_path, "a.tif", tiff(GREY, photometric="miniswhite", metadata=None))
    np.testing.assert_array_equal(read_image(path)[..., 0], 255 - GREY)
    np.testing.assert_array_equal(read_mask(path), 255 - GREY)


def test_a_boolean_mask_saved_by_tifffile_is_not_turned_round(tmp_path):
    path = put(tmp_path, "a.tif", tiff(GREY > 100))  # tifffile calls it white-is-zero
    np.testing.assert_array_equal(read_mask(path), GREY > 100)
    np.testing.assert_array_equal(read_image(path)[..., 0], (GREY > 100) * np.uint8(255))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
def test_label_maps_keep_type_and_values(tmp_path, dtype):
    mask = RNG.integers(0, np.iinfo(dtype).max, (9, 7)).astype(dtype)
    write_mask(tmp_path / "a.tif", mask)
    back = read_mask(tmp_path / "a.tif")
    assert back.dtype == dtype
    np.testing.assert_array_equal(back, mask)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (np.array([[0, 300]], np.int16), np.uint16),
        (np.array([[0, 70000]], np.int32), np.uint32),
        (np.array([[0.0, 4.0]], np.float64), np.uint8),
        (np.array([[0.0, 4000.0]], np.float32), np.uint16),
        (np.array([[0, 2**32 - 1]], np.uint64), np.uint32),
    ],
)
def test_whole_labels_of_other_types_are_cast(tmp_path, values, dtype):
    mask = read_mask(put(tmp_path, "a.tif", tiff(values)))
    assert mask.dtype == dtype
    np.testing.assert_array_equal(mask, values)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (FILES["rgb.png"], "RGB mask.*save one channel of labels"),
        (FILES["plain.tif"], "RGB mask.*save one channel of labels"),
        (tiff(np.zeros((5, 4, 5), np.uint8), photometric="rgb"), "mask with 5 bands.*one label"),
        (tiff(np.array([[0.0, 0.5]], np.float32)), r"not whole \(range 0 to 0.5\)"),
        (tiff(np.array([[0.0, np.nan]], np.float32)), "not whole"),
        (tiff(np.array([[-1, 5]], np.int16)), "labels from -1 to 5; expected 0"),
        (tiff(np.array([[0, 2**40]], np.uint64)), "expected 0 to 4294967295"),
    ],
)
def test_masks_that_are_no_masks(tmp_path, data, message):
    path = put(tmp_path, "маска.tif", data)
    with pytest.raises(ImageError, match=message) as caught:
        read_mask(path)
    assert str(path) in str(caught.value)


def test_three_equal_channels_and_alpha_make_a_mask(tmp_path):
    path = put(tmp_path, "a.png", encode(np.dstack([GREY, GREY, GREY, 255 - GREY]), "PNG"))
    np.testing.assert_array_equal(read_mask(path), GREY)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 130])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_any_number_of_bands_comes_back_from_tiff(tmp_path, channels, dtype):
    image = (RNG.random((6, 5, channels)) * 255).astype(dtype)
    write_image(tmp_path / "a.tiff", image)
    back = read_image(tmp_path / "a.tiff")
    assert back.dtype == dtype
    np.testing.assert_array_equal(back, image)


@pytest.mark.parametrize(
    "options",
    [
        {"photometric": "minisblack", "planarconfig": "separate"},
        {"photometric": "minisblack"},  # one page a band
        {"photometric": "minisblack", "compression": "zlib", "byteorder": ">"},
        {"imagej": True},
        {"imagej": True, "truncate": True},  # one page describes them all
        {"bigtiff": True, "photometric": "minisblack"},
    ],
)
def test_bands_of_every_layout_become_channels(tmp_path, options):
    bands = RNG.integers(0, 65535, (5, 8, 6)).astype(np.uint16)
    image = read_image(put(tmp_path, "a.tif", tiff(bands, **options)))
    assert image.dtype == np.dtype("=u2") and image.flags.c_contiguous
    np.testing.assert_array_equal(image, np.moveaxis(bands, 0, 2))


def test_only_declared_alpha_is_dropped_from_a_tiff(tmp_path):
    four = RNG.integers(0, 255, (6, 5, 4)).astype(np.uint8)
    alpha = put(tmp_path, "a.tif", tiff(four, photometric="rgb", extrasamples=["unassalpha"]))
    np.testing.assert_array_equal(read_image(alpha), four[..., :3])
    band = put(tmp_path, "b.tif", tiff(four, photometric="rgb", extrasamples=["unspecified"]))
    np.testing.assert_array_equal(read_image(band), four)


@pytest.mark.parametrize("flagged", [True, False])
def test_a_pyramid_gives_its_full_resolution(tmp_path, flagged):
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        for step in (1, 2, 4):
            writer.write(RGB[::step, ::step], subfiletype=int(flagged and step > 1), metadata=None)
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), RGB)
    with tifffile.TiffWriter(tmp_path / "b.tif") as writer:
        writer.write(RGB, subifds=1, metadata=None)
        writer.write(RGB[::2, ::2], subfiletype=1, metadata=None)
    np.testing.assert_array_equal(read_image(tmp_path / "b.tif"), RGB)


def test_smaller_and_preview_pages_are_left_out(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        writer.write(GREY[::2, ::2], metadata=None)  # the smallest level first
        writer.write(GREY, metadata=None)
        writer.write(GREY[::-1], subfiletype=1, metadata=None)  # a preview, whatever its size
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif")[..., 0], GREY)


def test_volumes_and_foreign_colours_are_refused(tmp_path):
    volume = np.zeros((16, 16, 16), np.uint8)
    path = put(tmp_path, "a.tif", tiff(volume, volumetric=True, tile=(16, 16, 16), photometric="minisblack"))
    with pytest.raises(ImageError, match="volume of depth 16; expected a picture"):
        read_image(path)
    for photometric in ("cielab", "ycbcr"):
        path = put(tmp_path, "a.tif", tiff(RGB, photometric=photometric))
        with pytest.raises(ImageError, match=f"colour type .*{photometric.upper()}.*expected grey, RGB or a palette"):
            read_image(path)


def test_headers_alone_tell_a_cut_file(tmp_path):
    for name, message in (
        ("rgb.jpg", "the JPEG has no end marker"),
        ("rgb.bmp", "the BMP header promises"),
        ("lossy.webp", "the WebP header promises"),
        ("rgb.png", "no end chunk"),
    ):
        with pytest.raises(ImageError, match="is truncated: .*" + message):
            read_image(put(tmp_path, name, FILES[name][:-30]))


def test_fill_bytes_between_jpeg_segments_are_skipped(tmp_path):
    data = FILES["rgb.jpg"]
    path = put(tmp_path, "a.jpg", data[:2] + b"\xff\x01\xff\xff" + data[2:])
    np.testing.assert_array_equal(read_image(path), read_image(put(tmp_path, "b.jpg", data)))


def test_several_colour_pages_are_refused(tmp_path):
    path = put(tmp_path, "a.tif", tiff(np.stack([RGB, RGB]), photometric="rgb"))
    with pytest.raises(ImageError, match="2 pages of 3 channels; expected one picture"):
        read_image(path)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (np.array([[0, 300]], np.int16), np.uint16),
        (np.array([[-3, 300]], np.int16), np.float32),
        (np.array([[0, 65535]], np.int32), np.uint16),
        (np.array([[0, 65536]], np.uint32), np.float32),
        (np.array([[0.25, 1e6]], np.float64), np.float32),
        (np.array([[0.5, 2]], np.float16), np.float32),
        (np.array([[0, 100]], np.int8), np.uint8),
    ],
)
def test_other_number_types_become_one_of_three(tmp_path, values, dtype):
    image = read_image(put(tmp_path, "a.tif", tiff(values)))
    assert image.dtype == dtype
    np.testing.assert_array_equal(image[..., 0], values)


def test_complex_pixels_are_refused(tmp_path):
    with pytest.raises(ImageError, match="complex64"):
        read_image(put(tmp_path, "a.tif", tiff(np.zeros((3, 3), np.complex64))))


def test_cmyk_tiff(tmp_path):
    picture = Image.fromarray(RGB).convert("CMYK")
    image = read_image(put(tmp_path, "a.tif", encode(picture, "TIFF")))
    np.testing.assert_allclose(image.astype(int), np.asarray(picture.convert("RGB")).astype(int), atol=1)


@pytest.mark.parametrize(
    ("dtype", "nodata", "text"),
    [
        (np.uint8, 0, "0"),
        (np.uint16, 255, "255.0 "),
        (np.int16, -9999, "-9999"),
        (np.float32, np.nan, "nan"),
        (np.float32, np.float32(-3.4028234663852886e38), "-3.40282e+38"),
        (np.float64, -1.7976931348623157e308, "-1.7976931348623157e+308"),
    ],
)
def test_nodata_needs_all_bands(tmp_path, dtype, nodata, text):
    values = np.full((3, 4, 3), 7, dtype)
    values[0, 0] = nodata  # no band holds data
    if not np.isnan(nodata) and abs(float(nodata)) < 1e30:
        values[1, 1, 0] = nodata  # two bands do
    path = put(tmp_path, "a.tif", tiff(values, photometric="rgb", extratags=[(42113, "s", 0, text, True)]))
    expected = np.ones((3, 4), bool)
    expected[0, 0] = False
    valid = read_valid(path)
    assert valid is not None and valid.dtype == bool
    np.testing.assert_array_equal(valid, expected)
    np.testing.assert_array_equal(read_image(path)[expected], values[expected])


def test_nodata_that_no_pixel_can_hold_or_none_declared(tmp_path):
    for text in ("-9999", "nan", "1e20"):
        valid = read_valid(put(tmp_path, "a.tif", tiff(GREY, extratags=[(42113, "s", 0, text, True)])))
        assert valid is not None and valid.all()
    assert read_valid(put(tmp_path, "b.tif", tiff(GREY))) is None
    assert read_valid(put(tmp_path, "b.png", encode(GREY, "PNG"))) is None
    with pytest.raises(ImageError, match="nodata value 'none at all'.*expected a number"):
        read_valid(put(tmp_path, "c.tif", tiff(GREY, extratags=[(42113, "s", 0, "none at all", True)])))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("text", [None, "nan"])
def test_nan_outside_declared_nodata_is_refused(tmp_path, value, text):
    values = np.ones((3, 4, 3), np.float32)
    values[1, 1, 0] = value  # the other two bands are finite, so the pixel is no nodata pixel
    tags = [] if text is None else [(42113, "s", 0, text, True)]
    with pytest.raises(ImageError, match="NaN or infinity in 1 pixels.*expected finite values"):
        read_image(put(tmp_path, "a.tif", tiff(values, photometric="rgb", extratags=tags)))


def test_list_images(tmp_path):
    for name in ("b.PNG", "a.x.jpeg", "é.tif", ".hidden.png", "._b.png", "notes.txt", "Thumbs.db"):
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    found = image_io.list_images(tmp_path)
    assert list(found) == ["a.x", "b", "\u00e9"]  # the last was saved as e and a combining accent, or as one letter
    assert found["b"] == tmp_path / "b.PNG"
    (tmp_path / "b.jpg").touch()
    with pytest.raises(ImageError, match=r"'b.PNG' and 'b.jpg'.*stem 'b'"):
        image_io.list_images(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist; expected a folder"):
        image_io.list_images(tmp_path / "nowhere")
    with pytest.raises(NotADirectoryError, match="is a file; expected a folder"):
        image_io.list_images(tmp_path / "b.jpg")


def test_decomposed_names_pair_with_composed_ones(tmp_path):
    (tmp_path / "e\u0301.png").touch()
    assert list(image_io.list_images(tmp_path)) == ["\u00e9"]


@pytest.mark.parametrize(
    ("name", "image", "message"),
    [
        ("a.jpg", np.zeros((4, 4, 3), np.uint16), "uint16; expected 1 or 3 of uint8: use .tif"),
        ("a.png", np.zeros((4, 4, 5), np.uint8), "5 channels.*use .tif"),
        ("a.png", np.zeros((4, 4, 1), np.float32), "float32; expected .* uint8 or uint16: use .tif"),
        ("a.gif", np.zeros((4, 4, 3), np.uint8), "expected the suffix .png"),
        ("a", np.zeros((4, 4, 3), np.uint8), "expected the suffix .png"),
        ("a.tif", np.zeros((4, 4, 3), np.float64), "float64 array.*expected"),
        ("a.tif", np.zeros((0, 4, 3), np.uint8), "shape"),
    ],
)
def test_images_that_a_format_cannot_hold(tmp_path, name, image, message):
    with pytest.raises(ImageError, match=message):
        write_image(tmp_path / name, image)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "mask", "message"),
    [
        ("a.jpg", np.zeros((4, 4), np.uint8), "without loss: use .png"),
        ("a.png", np.full((4, 4), 70000, np.uint32), "uint32 labels .largest is 70000.: use .tif"),
        ("a.bmp", np.zeros((4, 4), np.uint16), "use .tif"),
        ("a.png", np.zeros((4, 4, 3), np.uint8), r"expected \(H, W\)"),
        ("a.png", np.zeros((4, 4), np.int64), "int64 array.*expected"),
    ],
)
def test_masks_that_a_format_cannot_hold(tmp_path, name, mask, message):
    with pytest.raises(ImageError, match=message):
        write_mask(tmp_path / name, mask)
    assert not list(tmp_path.iterdir())


def test_atomic_write_replaces_only_at_the_end(tmp_path):
    path = tmp_path / "deep" / "er" / "a.txt"
    image_io.write_text(path, "old ёлка\n")
    assert path.read_bytes() == "old ёлка\n".encode()
    with pytest.raises(KeyboardInterrupt), image_io.atomic_write(path) as handle:
        handle.write(b"half")
        (hidden,) = (p for p in path.parent.iterdir() if p != path)
        assert hidden.name.startswith(".")
        raise KeyboardInterrupt
    assert path.read_text(encoding="utf-8") == "old ёлка\n"
    assert list(path.parent.iterdir()) == [path]
    image_io.write_text(path, "new")
    assert path.read_text() == "new" and list(path.parent.iterdir()) == [path]


def test_atomic_write_follows_a_link_and_keeps_usual_rights(tmp_path):
    target, link = tmp_path / "target.txt", tmp_path / "link.txt"
    target.touch()
    link.symlink_to(target)
    image_io.write_text(link, "text")
    assert link.is_symlink() and target.read_text() == "text"
    (tmp_path / "plain").touch()
    assert target.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_full_disk_names_the_target_and_leaves_nothing(tmp_path, monkeypatch):
    def no_space(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    write_mask(tmp_path / "a.png", np.zeros((4, 4), np.uint8))
    monkeypatch.setattr(os, "fsync", no_space)
    for name in ("a.png", "b.tif"):
        with pytest.raises(OSError, match="No space left on device; nothing was saved here.*" + name) as caught:
            write_mask(tmp_path / name, np.ones((4, 4), np.uint8))
        assert caught.value.errno == errno.ENOSPC
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    assert not read_mask(tmp_path / "a.png").any()


def test_a_write_cut_by_the_system_leaves_nothing(tmp_path):
    pytest.importorskip("resource")
    script = """
        import resource, sys
        sys.path.insert(0, sys.argv[1])
        import numpy as np
        import image_io
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        noise = np.random.default_rng(0).integers(0, 255, (200, 200, 3)).astype(np.uint8)
        for suffix in (".png", ".tif"):
            try:
                image_io.write_image(sys.argv[2] + "/a" + suffix, noise)
            except OSError as error:
                assert "a" + suffix in str(error) and "nothing was saved" in str(error), error
            else:
                raise SystemExit("no error")
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(ROOT), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())


def test_unwritable_places_name_the_target(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    for path in (tmp_path / "file" / "a.png", tmp_path / "folder.png"):
        with pytest.raises(OSError, match=re.escape(str(path))):
            write_mask(path, np.zeros((4, 4), np.uint8))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.png"]


@pytest.mark.parametrize("channels", [1, 3, 5, 130])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("size", [(4, 4), (16, 16), (4, 16), (8, 8), (8, 5)])
def test_resize_image_keeps_type_channels_and_each_channels_level(channels, dtype, size):
    image = np.broadcast_to(np.arange(1, channels + 1).astype(dtype), (8, 8, channels)).copy()
    resized = image_io.resize_image(image, size)
    assert resized.shape == (*size, channels) and resized.dtype == dtype
    np.testing.assert_allclose(resized, np.broadcast_to(image[0, 0], resized.shape), rtol=1e-6)


def test_resize_image_averages_areas_per_axis():
    image = np.array([[0, 100, 20, 40], [0, 100, 20, 40]], np.float32)[..., None]
    np.testing.assert_allclose(image_io.resize_image(image, (1, 2))[..., 0], [[50, 30]])
    np.testing.assert_allclose(image_io.resize_image(image, (4, 2))[..., 0], [[50, 30]] * 4, rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.int64])
def test_resize_mask_takes_the_label_under_the_centre(dtype):
    mask = np.array([[1, 2, 3], [4, 5, 6], [7, 8, 250]], dtype)
    np.testing.assert_array_equal(image_io.resize_mask(mask, (1, 1)), [[5]])
    np.testing.assert_array_equal(image_io.resize_mask(mask, (6, 3)), mask.repeat(2, axis=0))
    assert image_io.resize_mask(mask, (7, 5)).dtype == dtype


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_resized_image_and_mask_stay_aligned(dtype):
    mask = np.zeros((64, 48), np.uint8)
    mask[16:48, 12:36] = 1
    for size in ((32, 24), (128, 96), (100, 31)):
        image = image_io.resize_image((mask[..., None] * 200).astype(dtype), size)[..., 0]
        assert np.mean((image > 100) == (image_io.resize_mask(mask, size) > 0)) > 0.98


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_preprocessing_keeps_type_shape_and_range(dtype, channels):
    top = 1.0 if dtype == np.float32 else np.iinfo(dtype).max
    image = ((0.4 + 0.1 * RNG.random((64, 48, channels))) * top).astype(dtype)
    before = image.copy()
    for steps in (["clahe"], ["denoise"], ["stretch"], ["denoise", "clahe", "stretch"]):
        result = image_io.preprocess(image, steps)
        assert result.dtype == dtype and result.shape == image.shape
        assert 0 <= result.min() and result.max() <= top
        assert not np.array_equal(result, image)
    np.testing.assert_array_equal(image, before)
    assert np.ptp(image_io.preprocess(image, ["stretch"]).astype(float)) == pytest.approx(top)
    assert image_io.preprocess(image, ["denoise"]).std() < image.std()
    assert image_io.preprocess(image, []) is image


def test_clahe_raises_local_contrast_at_every_depth():
    rows = np.linspace(0, 1, 128)[:, None] + 0.02 * np.sin(np.arange(128) * 1.5)
    for dtype, top in ((np.uint8, 255), (np.uint16, 4095), (np.float32, 1.0)):
        image = (np.clip(rows, 0, 1) * top).astype(dtype)[..., None]
        result = image_io.preprocess(image, ["clahe"])
        assert result.astype(float).std(axis=1).mean() > 1.2 * image.astype(float).std(axis=1).mean()


def test_preprocessing_of_odd_images():
    for dtype in (np.uint8, np.uint16, np.float32):
        flat = np.full((1, 3, 2), 7, dtype)
        np.testing.assert_array_equal(image_io.preprocess(flat, ["denoise", "stretch"]), flat)
        image_io.preprocess(flat, ["clahe"])
    image = RNG.random((20, 20, 2)).astype(np.float32)
    image[3, 4] = np.nan
    result = image_io.preprocess(image, ["denoise", "clahe", "stretch"])
    assert np.isnan(result[3, 4]).all() and np.isfinite(np.delete(result.reshape(-1, 2), 64, axis=0)).all()
    with pytest.raises(ValueError, match="'sharpen'; expected some of: clahe denoise stretch"):
        image_io.preprocess(image, ["sharpen"])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("channels", [1, 3, 200])
def test_normalise_is_the_formula_in_float32(dtype, channels):
    image = (RNG.random((9, 7, channels)) * 255).astype(dtype)
    mean, std = RNG.random(channels) * 100, RNG.random(channels) * 50 + 1
    result = image_io.normalise(image, mean.tolist(), std.tolist())
    assert result.dtype == np.float32
    if dtype == np.uint8 and channels == 3:
        assert result.transpose(1, 2, 0).flags.c_contiguous  # what a channels-last network takes without a copy
    expected = (image.astype(np.float32) - mean.astype(np.float32)) / std.astype(np.float32)
    np.testing.assert_array_equal(result, expected.transpose(2, 0, 1))
    np.testing.assert_array_equal(result[:, ::-1], image_io.normalise(image[::-1], mean.tolist(), std.tolist()))


def test_normalise_floors_the_deviation_and_checks_the_counts():
    image = np.full((2, 2, 1), 3, np.uint8)
    assert image_io.normalise(image, [3], [0]).max() == 0
    assert image_io.normalise(image, [2], [0]).max() == pytest.approx(1e6)
    with pytest.raises(ValueError, match="1 channels, the statistics 3 means and 3 standard deviations"):
        image_io.normalise(image, [1, 2, 3], [1, 2, 3])


@pytest.mark.skipif("TESSERA_DATA" not in os.environ, reason="TESSERA_DATA names no folder of real data")
def test_real_files_equal_their_decoders():
    files = [p for p in sorted(Path(os.environ["TESSERA_DATA"]).rglob("*")) if p.suffix in image_io.IMAGE_SUFFIXES]
    assert files
    for path in files:
        if path.suffix in (".tif", ".tiff"):
            expected = tifffile.imread(path, key=0)
        else:
            picture = Image.open(path)
            expected = np.asarray(picture if picture.mode in ("L", "RGB", "I;16") else picture.convert("RGB"))
        image = read_image(path)
        assert image.dtype == expected.dtype, path
        np.testing.assert_array_equal(image.reshape(expected.shape), expected, err_msg=str(path))
        if path.parent.name in ("gt", "fov"):
            np.testing.assert_array_equal(read_mask(path), expected, err_msg=str(path))
