"""One picture: read as the network's numbers at any scale, predicted in bands, enlarged, cleared where nothing is."""

import cv2
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

import pictures
import predictor
import slide_sources
from checkpoint import Geometry, ModelConfig
from image_io import ImageError, normalise, read_image, write_image
from pairing import Pair
from predictor import Picture, ReadOptions, TileOptions, plan_picture, predict_picture
from tiling import plan_axis
from tissue import Tissue


def config(**changes):
    values = {
        "architecture": "plain-unet",
        "encoder": "plain-16",
        "labels": (1,),
        "class_names": ("background", "object"),
        "channels": ("red", "green", "blue"),
        "mean": (100.0, 120.0, 140.0),
        "std": (50.0, 60.0, 70.0),
        "geometry": Geometry("crops", (64, 64), 64, 16, 4),
        "stride": 8,
        "min_side": 16,
    }
    return ModelConfig(**(values | changes))


def sigmoid(batch):
    return 1 / (1 + np.exp(-batch[:, :1]))


def random_pixels(height, width, channels=3, seed=0, dtype=np.uint8):
    top = np.iinfo(dtype).max
    return np.random.default_rng(seed).integers(0, top, (height, width, channels), endpoint=True, dtype=dtype)


def write_slide(path, pixels, **options):
    tifffile.imwrite(path, pixels, tile=(64, 64), compression="zlib", photometric="rgb", **options)
    return Pair(path.stem, path)


def predict(pair, configs, options=None, read=None, forward=sigmoid, **more):
    options = options or TileOptions(64, 16, 4, batch=3)
    with Picture(pair, configs, read or ReadOptions()) as picture:
        plan = plan_picture(picture, options, full_size=more.pop("full_size", False))
        found = predict_picture(picture, forward, plan, options, **more)
        bands = [(top, band.copy()) for top, band in found]
        tops = [top for top, _ in bands]
        assert tops == [tops[0] + sum(band.shape[1] for _, band in bands[:k]) for k in range(len(bands))]
        return np.concatenate([band for _, band in bands], axis=1), picture, plan


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_pixels_meet_the_network_as_in_training(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    write_image(path, random_pixels(150, 210))
    found, _, plan = predict(Pair("a", path), [config()])
    whole = sigmoid(normalise(read_image(path), config().mean, config().std)[None])[0]
    assert plan.tiles > 6
    np.testing.assert_allclose(found, whole, atol=1e-6)


def test_extra_channels_are_read_beside_the_image(tmp_path):
    write_image(tmp_path / "a.png", random_pixels(90, 80))
    write_image(tmp_path / "n.png", random_pixels(90, 80, 1, seed=1))
    wide = config(channels=("red", "green", "blue", "nir"), mean=(1.0,) * 4, std=(9.0,) * 4)
    pair = Pair("a", tmp_path / "a.png", extras=(tmp_path / "n.png",))
    seen = []

    def forward(batch):
        seen.append(batch)
        return sigmoid(batch[:, 3:])

    found, _, _ = predict(pair, [wide], forward=forward)
    assert seen[0].shape[1] == 4
    extra = normalise(read_image(tmp_path / "n.png"), (1.0,), (9.0,))
    np.testing.assert_allclose(found, sigmoid(extra[None])[0], atol=1e-6)


def test_members_of_an_ensemble_get_their_own_statistics(tmp_path):
    pair = write_slide(tmp_path / "a.tif", random_pixels(100, 90))
    configs = [config(), config(mean=(0.0, 0.0, 0.0), std=(30.0, 30.0, 30.0))]
    members = [lambda batch: sigmoid(batch) ** 2, sigmoid]
    found, _, _ = predict(pair, configs, forward=predictor.mean_of(members, 3))
    image = read_image(pair.image)
    expected = [
        member(normalise(image, each.mean, each.std)[None])[0] for member, each in zip(members, configs, strict=True)
    ]
    np.testing.assert_allclose(found, (expected[0] + expected[1]) / 2, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    scale=st.sampled_from([1.5, 2.0, 3.0, 3.7, 16.0]),
    heights=st.lists(st.integers(1, 9), min_size=40, max_size=40),
    part=st.floats(0, 0.999),
    channels=st.integers(1, 2),
)
def test_enlarging_is_linear_at_pixel_centres_wherever_bands_part(height, width, scale, heights, part, channels):
    small = np.random.default_rng(0).random((channels, height, width)).astype(np.float32)
    wanted = (round(height * scale), round(width * scale))
    first = int(part * wanted[0])

    def bands(begin):
        top = begin
        for step in heights:
            if top < height:
                yield top, small[:, top : top + step]
                top += step

    begin = max(0, int(np.floor((first + 0.5) / scale - 0.5)))
    parts = list(predictor.enlarge_bands(bands(begin), (height, width), wanted, scale, first))
    assert parts[0][0] == first
    found = np.concatenate([band for _, band in parts], axis=1)

    rows = np.clip((np.arange(wanted[0]) + 0.5) / scale - 0.5, 0, height - 1)
    columns = np.clip((np.arange(wanted[1]) + 0.5) / scale - 0.5, 0, width - 1)
    expected = np.stack([[np.interp(columns, np.arange(width), row) for row in channel] for channel in small])
    expected = np.stack(
        [np.stack([np.interp(rows, np.arange(height), column) for column in each.T], axis=1) for each in expected]
    )
    np.testing.assert_allclose(found, expected[:, first:], atol=2e-6)


def test_reduced_and_enlarged_results_lie_where_the_image_does(tmp_path):
    pixels = np.zeros((333, 259, 3), np.uint8)
    pixels[160:240, 80:176] = 255
    pair = write_slide(tmp_path / "a.tif", pixels)
    found, picture, _ = predict(
        pair, [config(mean=(127.0,) * 3, std=(10.0,) * 3)], read=ReadOptions(reduce=4), full_size=True
    )
    assert (picture.height, picture.width) == (83, 65) and found.shape == (1, 333, 259)
    wrong = np.argwhere((found[0] >= 0.5) != (pixels[:, :, 0] > 0))
    assert set(map(tuple, wrong)) <= {(160, 80), (160, 175), (239, 80), (239, 175)}, "only the corners are rounded"


@pytest.mark.parametrize("full_size", [False, True])
@pytest.mark.parametrize("first_row", [1, 64, 200, 332])
def test_a_later_first_row_gives_the_same_bits(tmp_path, full_size, first_row):
    pair = write_slide(tmp_path / "a.tif", random_pixels(333, 150))
    read = ReadOptions(reduce=2 if full_size else None)
    whole, _, _ = predict(pair, [config()], read=read, full_size=full_size)
    rest, _, _ = predict(pair, [config()], read=read, full_size=full_size, first_row=first_row)
    np.testing.assert_array_equal(rest, whole[:, first_row:])


def test_the_last_rows_of_a_level_that_is_a_pixel_short_are_enlarged_too(tmp_path):
    pixels = random_pixels(682, 400)
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as tif:
        tif.write(pixels, tile=(64, 64), photometric="rgb", subifds=1)
        tif.write(pixels[:680:2, :398:2], tile=(64, 64), photometric="rgb", subfiletype=1)
    how = {"read": ReadOptions(level=1), "full_size": True}
    whole, picture, _ = predict(Pair("a", path), [config()], **how)
    rest, _, _ = predict(Pair("a", path), [config()], first_row=681, **how)
    assert picture.height == 340 and whole.shape == (1, 682, 400)
    np.testing.assert_array_equal(rest, whole[:, 681:])


def tissue_slide(path):
    """White glass with a purple patch, grey dust and a black corner."""
    pixels = np.full((700, 900, 3), 240, np.uint8)
    pixels[300:420, 500:700] = (150, 60, 160)
    pixels[:80, :80] = 0
    pixels[600, 100] = (255, 0, 0)
    return write_slide(path, pixels), pixels


@pytest.mark.parametrize("rule", ["saturation", "otsu"])
def test_tiles_without_tissue_are_skipped_and_tissue_keeps_all_its_tiles(tmp_path, rule):
    pair, pixels = tissue_slide(tmp_path / "a.tif")
    seen = []

    def forward(batch):
        seen.append(len(batch))
        return np.full_like(batch[:, :1], 0.75) + 1e-3 * batch[:, :1]

    options = TileOptions(64, 16, 4, batch=4, tissue=rule)
    found, picture, plan = predict(pair, [config()], options, forward=forward)
    assert sum(seen) == plan.tiles < 0.25 * plan.keep.size
    whole = forward(normalise(pixels, config().mean, config().std)[None])[0]
    region = plan.tissue.rows(0, 700)
    assert region[300:420, 500:700].all() and not region[:250].any() and not region[500:].any()
    np.testing.assert_allclose(found[:, region], whole[:, region], atol=1e-6)
    assert (found[:, ~region] == 0).all()


def test_what_has_no_tissue_is_not_decoded(tmp_path, monkeypatch):
    pixels = np.full((2048, 2048, 3), 240, np.uint8)
    pixels[200:300, 700:900] = (150, 60, 160)
    pixels[248:252, 740:760] = 7
    nodata = [(42113, "s", 0, "7", True)]
    with tifffile.TiffWriter(tmp_path / "a.tif") as tif:
        tif.write(pixels, tile=(64, 64), photometric="rgb", compression="zlib", subifds=1, extratags=nodata)
        tif.write(pixels[::4, ::4].copy(), tile=(64, 64), photometric="rgb", compression="zlib", subfiletype=1)
    monkeypatch.setattr("tissue.THUMBNAIL_SIDE", 512)
    load, decoded = slide_sources._TiffLevel.load, []

    def counted(level, row, column):
        decoded.append(level.index)
        return load(level, row, column)

    monkeypatch.setattr(slide_sources._TiffLevel, "load", counted)
    options = TileOptions(64, 16, 4, tissue="saturation")
    found, _, plan = predict(Pair("a", tmp_path / "a.tif"), [config()], options)
    region = plan.tissue.rows(0, 2048)
    assert (found[:, ~region] == 0).all() and (found[:, 248:252, 740:760] == 0).all() and found[0, 230, 750] > 0
    assert 0 < decoded.count(0) < 1024 / 4


def test_outside_tissue_several_classes_are_background(tmp_path):
    pair, _ = tissue_slide(tmp_path / "a.tif")
    three = config(labels=(1, 2), class_names=("background", "one", "two"))
    options = TileOptions(64, 16, 4, tissue="saturation")
    found, _, plan = predict(
        pair, [three], options, forward=lambda batch: np.full((len(batch), 3, *batch.shape[2:]), 1 / 3, np.float32)
    )
    region = plan.tissue.rows(0, 700)
    assert (found[:, ~region] == np.array([1, 0, 0])[:, None]).all()
    np.testing.assert_allclose(found.sum(axis=0), 1, atol=1e-6)


@given(
    size=st.tuples(st.integers(1, 150), st.integers(1, 150)),
    shares=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)),
    seed=st.integers(0, 99),
)
@settings(max_examples=100, deadline=None)
def test_a_tile_is_skipped_only_if_no_pixel_of_it_is_tissue(size, shares, seed):
    small = tuple(max(1, round(share * length)) for share, length in zip(shares, size, strict=True))
    tissue = Tissue(np.random.default_rng(seed).random(small) < 0.05, *size)
    rows, cols = (plan_axis(length, tile=32, overlap=8, halo=0, stride=8, min_side=0, window="hann") for length in size)
    region = tissue.rows(0, size[0])
    expected = [
        [region[top : top + rows.tile, left : left + cols.tile].any() for left in cols.origins] for top in rows.origins
    ]
    np.testing.assert_array_equal(tissue.tiles(rows, cols), expected)


def test_grey_slides_have_no_saturation(tmp_path):
    write_image(tmp_path / "a.png", random_pixels(90, 90, 1))
    grey = config(channels=("grey",), mean=(1.0,), std=(1.0,))
    with pytest.raises(ImageError, match="1 channel.*no saturation; use --tissue otsu"):
        predict(Pair("a", tmp_path / "a.png"), [grey], TileOptions(64, 16, 4, tissue="saturation"))


def test_otsu_finds_the_side_that_the_border_is_not(tmp_path):
    from tissue import tissue_mask

    for inside, outside in ((200, 30), (30, 200)):
        picture = np.full((300, 300, 1), outside, np.uint8)
        cv2.circle(picture, (150, 150), 60, (inside,), -1)
        mask = tissue_mask(picture, "otsu", margin=1)
        assert mask[150, 150] and not mask[0, 0] and abs(mask.sum() - np.pi * 61**2) < 600


def test_nodata_is_background(tmp_path):
    pixels = random_pixels(120, 100)
    pixels[:50] = 7
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, pixels, tile=(64, 64), photometric="rgb", extratags=[(42113, "s", 0, "7", True)])
    found, _, _ = predict(Pair("a", path), [config()])
    assert (found[:, :50] == 0).all() and (found[:, 50:] > 0).all()


def test_preprocessing_sees_the_whole_image(tmp_path):
    from image_io import preprocess

    write_image(tmp_path / "a.png", random_pixels(200, 150))
    steps = config(preprocess=("clahe", "stretch"))
    found, _, _ = predict(Pair("a", tmp_path / "a.png"), [steps])
    image = preprocess(read_image(tmp_path / "a.png"), ("clahe", "stretch"))
    np.testing.assert_allclose(found, sigmoid(normalise(image, steps.mean, steps.std)[None])[0], atol=1e-6)
    with pytest.raises(ImageError, match="--preprocess clahe stretch.*--reduce 2 was given; leave it out"):
        predict(Pair("a", tmp_path / "a.png"), [steps], read=ReadOptions(reduce=2))


def test_resize_networks_see_the_whole_image(tmp_path):
    write_image(tmp_path / "a.png", random_pixels(200, 150))
    seen = []

    def forward(batch):
        seen.append(batch.shape)
        return sigmoid(batch)

    whole = config(geometry=Geometry("resize", (64, 96)))
    found, _, _ = predict(Pair("a", tmp_path / "a.png"), [whole], forward=forward)
    assert seen == [(1, 3, 64, 96)] and found.shape == (1, 200, 150)


@pytest.mark.parametrize(
    ("read", "expected"),
    [(ReadOptions(), 2.0), (ReadOptions(reduce=3), 3.0), (ReadOptions(mpp=1.0), 4.0), (ReadOptions(level=0), 1.0)],
)
def test_the_scale_is_the_training_s_unless_another_is_asked_for(tmp_path, read, expected):
    pair = write_slide(
        tmp_path / "a.tif", random_pixels(400, 400), resolution=(40000, 40000), resolutionunit="CENTIMETER"
    )
    trained = config(geometry=Geometry("crops", (64, 64), 64, 16, 4, mpp=0.5))
    with Picture(pair, [trained], read) as picture:
        assert picture.scale == pytest.approx(expected)
        assert bool(picture.notes) == (expected != 2.0)


def test_a_slide_without_a_scale_is_said(tmp_path):
    pair = write_slide(tmp_path / "a.tif", random_pixels(100, 100))
    trained = config(geometry=Geometry("crops", (64, 64), 64, 16, 4, mpp=0.5))
    with Picture(pair, [trained], ReadOptions()) as picture:
        assert "0.5 um per pixel, the file does not say" in picture.notes[0]


def test_other_channels_are_refused(tmp_path):
    write_image(tmp_path / "a.png", random_pixels(30, 30, 1))
    with pytest.raises(ImageError, match=r"a\.png has 1 channels, the network takes 3 \(red green blue\)"):
        predict(Pair("a", tmp_path / "a.png"), [config()])


def test_pictures_are_listed_from_files_folders_and_globs(tmp_path):
    for name in ("b.png", "a.svs", "c.TIF", "notes.txt", ".hidden.png"):
        (tmp_path / name).write_bytes(b"x")
    names = lambda words: [path.name for path in pictures.list_pictures(words)]  # noqa: E731
    assert names([str(tmp_path)]) == ["a.svs", "b.png", "c.TIF"]
    assert names([str(tmp_path / "*.png"), str(tmp_path / "b.png")]) == ["b.png"]
    with pytest.raises(FileNotFoundError, match="names no image or slide"):
        names([str(tmp_path / "*.jpg")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="the folder .*empty holds no image or slide"):
        names([str(tmp_path / "empty")])
    with pytest.raises(FileNotFoundError, match="names no image or slide"):
        names([str(tmp_path / "emp*")])  # folders alone


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.bmp", "a.webp"])
def test_pixels_are_counted_without_decoding(tmp_path, name, monkeypatch):
    import slide_sources

    write_image(tmp_path / name, random_pixels(70, 50))
    monkeypatch.setattr(slide_sources, "read_image", None)
    assert pictures.count_pixels(tmp_path / name) == 3500
    (tmp_path / name).write_bytes(b"nonsense")
    assert pictures.count_pixels(tmp_path / name) == pictures.count_pixels(tmp_path / "absent.png") == 0


def test_pixels_of_a_picture_past_pillow_s_limit_are_counted(tmp_path, monkeypatch):
    write_image(tmp_path / "a.png", random_pixels(70, 50))
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 1000)
    assert pictures.count_pixels(tmp_path / "a.png") == 2000
