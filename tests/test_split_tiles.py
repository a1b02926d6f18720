import os

import numpy as np
import pytest
import tifffile

from dataset_utils import split_tiles
from image_io import read_image, read_mask, write_image
from slide_io import open_slide

HEIGHT, WIDTH = 70, 103
RNG = np.random.default_rng(1)
RGB = RNG.integers(0, 256, (HEIGHT, WIDTH, 3)).astype(np.uint8)
NIR = RNG.integers(0, 65536, (HEIGHT, WIDTH)).astype(np.uint16)
HEAT = RNG.normal(size=(HEIGHT, WIDTH)).astype(np.float32)
WATER = ((np.indices((HEIGHT, WIDTH)).sum(axis=0) % 90 < 30) * 64).astype(np.uint8)
SCALE = (33550, 12, 3, (0.5, 0.5, 0.0), True)
TIE = (33922, 12, 6, (0.0, 0.0, 0.0, 5000.0, 9000.0, 0.0), True)
KEYS = (34735, 3, 12, (1, 1, 0, 2, 1024, 0, 1, 1, 3072, 0, 1, 32637), True)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """Many small files need not reach the disk here."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def scene(tmp_path):
    """Four rasters of one place, each stored in its own way."""
    tifffile.imwrite(tmp_path / "rgb.tif", RGB, tile=(32, 32), photometric="rgb", extratags=[SCALE, TIE, KEYS])
    tifffile.imwrite(tmp_path / "near.tif", NIR, rowsperstrip=7, compression="zlib")
    tifffile.imwrite(tmp_path / "heat.tif", HEAT, tile=(16, 48))
    write_image(tmp_path / "water.png", WATER)
    return tmp_path


def run(folder, *more, out="out", rasters=("images=rgb.tif", "nir=near.tif", "heat=heat.tif", "gt=water.png"), size=32):
    words = [f"{name}={folder / path}" for name, path in (word.split("=", 1) for word in rasters)]
    split_tiles.main([*map(str, ["-i", *words, "-o", folder / out, "--size", size, *more])])
    return folder / out


def fails(capsys, *arguments, status=1, **named):
    with pytest.raises(SystemExit) as stopped:
        run(*arguments, **named)
    assert stopped.value.code == status
    return capsys.readouterr().err


def origins(length, size, shift):
    """The places that the predecessor scans, and one more for the remainder."""
    found = list(range(0, max(length - size, 0) + 1, shift))
    return found if found[-1] + size >= length else [*found, length - size]


@pytest.mark.parametrize(("size", "shift"), [(32, 32), (32, 13), (35, 35), (70, 50)])
def test_tiles_are_crops_of_every_raster(scene, size, shift):
    out = run(scene, "--shift", shift, size=size)
    places = [(top, left) for top in origins(HEIGHT, size, shift) for left in origins(WIDTH, size, shift)]
    for folder, whole in (("images", RGB), ("nir", NIR), ("heat", HEAT), ("gt", WATER)):
        names = {path.name for path in (out / folder).iterdir()}
        assert names == {f"rgb_{n}.tif" for n in range(1, len(places) + 1)}
        for number, (top, left) in enumerate(places, 1):
            tile = tifffile.imread(out / folder / f"rgb_{number}.tif")
            assert tile.dtype == whole.dtype
            np.testing.assert_array_equal(tile, whole[top : top + size, left : left + size])


def test_names_by_place(scene):
    out = run(scene, "--names", "coordinates", "--name", "lake", rasters=("images=rgb.tif", "gt=water.png"))
    names = {path.stem for path in (out / "gt").iterdir()}
    assert names == {f"lake_x{x}_y{y}" for x in (0, 32, 64, 71) for y in (0, 32, 38)}
    np.testing.assert_array_equal(read_mask(out / "gt" / "lake_x71_y38.tif"), WATER[38:, 71:])


def test_a_scene_smaller_than_a_tile_is_one_tile(scene):
    out = run(scene, size=512)
    assert [path.name for path in (out / "images").iterdir()] == ["rgb_1.tif"]
    np.testing.assert_array_equal(read_image(out / "images" / "rgb_1.tif"), RGB)


@pytest.mark.parametrize("rule", ["64=300", "gt:64=300"])
def test_a_place_is_kept_with_more_than_so_many_pixels(scene, capsys, rule):
    out = run(scene, "--min-label", rule)
    counts = {}
    places = [(top, left) for top in origins(HEIGHT, 32, 32) for left in origins(WIDTH, 32, 32)]
    for number, (top, left) in enumerate(places, 1):
        counts[f"rgb_{number}.tif"] = np.count_nonzero(WATER[top : top + 32, left : left + 32] == 64)
    kept = {name for name, count in counts.items() if count > 300}
    assert 0 < len(kept) < len(counts)
    for folder in ("images", "nir", "heat", "gt"):
        assert {path.name for path in (out / folder).iterdir()} == kept
    assert f"{len(kept)} written, {len(counts) - len(kept)} without enough" in capsys.readouterr().out
    exactly = counts[min(kept)]
    strict = run(scene, "--min-label", f"64={exactly}", out="strict")
    assert not (strict / "gt" / min(kept)).exists(), "strictly more"
    looser = run(scene, "--min-label", f"64={exactly - 1}", out="looser")
    assert (looser / "gt" / min(kept)).exists()


MATRIX = (34264, 12, 16, (0.0, 0.5, 0.0, 5000.0, -0.5, 0.0, 0.0, 9000.0, *[0.0] * 7, 1.0), True)
POINTS = (34735, 3, 16, (1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 2, 3072, 0, 1, 32637), True)
OFF = (33922, 12, 6, (10.0, 20.0, 0.0, 5000.0, 9000.0, 0.0), True)


@pytest.mark.parametrize(
    "tags", [[SCALE, TIE, KEYS], [SCALE, TIE, POINTS], [MATRIX, KEYS], [MATRIX, POINTS], [SCALE, OFF]]
)
def test_every_tile_knows_its_place_on_the_map(tmp_path, tags):
    tifffile.imwrite(tmp_path / "rgb.tif", RGB, tile=(32, 32), photometric="rgb", extratags=tags)
    out = run(tmp_path, "--names", "coordinates", rasters=("images=rgb.tif",))
    with open_slide(tmp_path / "rgb.tif") as slide:
        a, b, c, d, e, f = slide.geo.affine()
    for path in (out / "images").iterdir():
        x, y = (int(word[1:]) for word in path.stem.split("_")[1:])
        with open_slide(path) as tile:
            wanted = a, b, a * x + b * y + c, d, e, d * x + e * y + f
            np.testing.assert_allclose(tile.geo.affine(), wanted, rtol=0, atol=1e-9)
            assert tile.geo.epsg() == slide.geo.epsg()


def test_several_tie_points_move_with_the_tile():
    from slide_io import Georeference

    points = (33922, 12, 12, (0.0, 0.0, 0.0, 5.0, 6.0, 0.0, 50.0, 60.0, 0.0, 7.0, 8.0, 0.0), True)
    (moved,) = split_tiles.moved_tags(Georeference((points,)), top=30, left=20)
    assert moved[3] == (-20.0, -30.0, 0.0, 5.0, 6.0, 0.0, 30.0, 30.0, 0.0, 7.0, 8.0, 0.0)


def test_nodata_stays_declared(tmp_path):
    values = HEAT.copy()
    values[:40, :50] = -9999
    tifffile.imwrite(tmp_path / "heat.tif", values, tile=(16, 16), extratags=[(42113, 2, 6, "-9999", True)])
    out = run(tmp_path, rasters=("images=heat.tif",))
    np.testing.assert_array_equal(tifffile.imread(out / "images" / "heat_2.tif"), values[:32, 32:64])
    with open_slide(out / "images" / "heat_2.tif") as tile:
        assert tile.nodata == -9999
        valid = tile.grid().valid(0, 0, 32, 32)
    assert not valid[:, :18].any() and valid[:, 18:].all()


def test_a_damaged_tile_is_left_out_of_every_folder(scene, capsys):
    with tifffile.TiffFile(scene / "near.tif") as tif:
        place = tif.pages[0].dataoffsets[0], tif.pages[0].databytecounts[0]  # rows 0 to 6
    with (scene / "near.tif").open("r+b") as file:
        file.seek(place[0])
        file.write(b"\xaa" * place[1])
    message = fails(capsys, scene)
    assert "near.tif" in message and "rows 0 to 6" in message and "left out the tile rgb_1" in message
    names = [{path.name for path in (scene / "out" / folder).iterdir()} for folder in ("images", "nir", "heat", "gt")]
    assert all(each == {f"rgb_{n}.tif" for n in range(5, 13)} for each in names)


def test_words_and_files_that_cannot_be(scene, capsys):
    write_image(scene / "narrow.png", WATER[:, 1:])
    message = fails(capsys, scene, rasters=("images=rgb.tif", "gt=narrow.png"))
    assert "differ in size" in message and "70x103" in message and "70x102" in message and "resample" in message
    assert "two rasters of one name" in fails(capsys, scene, rasters=("gt=rgb.tif", "gt=water.png"), status=2)
    assert "there is no raster 'water'" in fails(capsys, scene, "--min-label", "water:64=1", status=2)
    assert "3 channels" in fails(capsys, scene, "--min-label", "images:64=1")
    assert "expected a label and a number" in fails(capsys, scene, "--min-label", "64", status=2)
    assert "expected a folder's name and a file" in fails(capsys, scene, rasters=("../x=rgb.tif",), status=2)
    assert "none.tif" in fails(capsys, scene, rasters=("images=none.tif",))
    assert not (scene / "out").exists()


def test_tiles_that_are_there_are_replaced_only_when_asked(scene, capsys):
    run(scene)
    path = scene / "out" / "gt" / "rgb_3.tif"
    path.write_bytes(b"mine")
    message = fails(capsys, scene)
    assert "tiles are there" in message and "--overwrite" in message and path.read_bytes() == b"mine"
    run(scene, "--overwrite")
    np.testing.assert_array_equal(read_mask(path), WATER[:32, 64:96])


def test_rows_of_tiles_need_no_whole_raster(tmp_path, monkeypatch):
    """Every read is a window of the size of a tile."""
    import slide_io

    seen = []
    read = slide_io.Grid.read
    monkeypatch.setattr(slide_io.Grid, "read", lambda self, *window: seen.append(window[2:]) or read(self, *window))
    tifffile.imwrite(tmp_path / "rgb.tif", RGB, tile=(32, 32), photometric="rgb")
    run(tmp_path, rasters=("images=rgb.tif",))
    assert seen and set(seen) == {(32, 32)}
