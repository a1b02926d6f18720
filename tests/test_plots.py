"""Pictures: sizes, colours where they belong, any kind of image, curves."""

import cv2
import numpy as np
import pytest

import plots

SQUARE = np.zeros((40, 60), np.uint8)
SQUARE[10:30, 10:30] = 1
NAMES = ("background", "bubble")
GREY = np.full((40, 60, 3), 100, np.uint8)


def count(picture, colour):
    """Pixels of exactly this colour."""
    return int((picture == np.array(colour)).all(axis=-1).sum())


def solid(opacity, colour, backdrop):
    """What a colour looks like over a backdrop."""
    return tuple(round(opacity * part + (1 - opacity) * backdrop) for part in colour)


def test_overlay_fills_outlines_and_leaves_the_rest():
    shown = plots.overlay(GREY, SQUARE)
    assert shown.shape == (40, 60, 3)
    assert shown.dtype == np.uint8
    around = np.zeros_like(SQUARE)
    around[9:31, 10:30] = around[10:30, 9:31] = 1
    assert (shown[(SQUARE | around) == 0] == 100).all()
    assert (shown[(around == 1) & (SQUARE == 0)] == plots.INK).all()
    assert count(shown, plots.PALETTE[0]) == 20 * 20 - 18 * 18  # the ring of outer pixels
    assert count(shown, solid(plots.FILL, plots.PALETTE[0], 100)) == 18 * 18
    assert (GREY == 100).all()  # the caller's image is left alone


@pytest.mark.parametrize("backdrop", [(86, 180, 233), (0, 0, 0), (40, 20, 70), (255, 255, 255)])
def test_an_outline_shows_on_any_picture(backdrop):
    """Also on tissue as dark as its stain, and where the picture has the colour of the class."""
    picture = np.broadcast_to(np.array(backdrop, np.uint8), (40, 60, 3)).copy()
    difference = np.abs(plots.overlay(picture, SQUARE).astype(int) - picture).sum(axis=2)
    assert (difference[9:11, 12:28].max(axis=0) > 250).all()


def test_overlay_takes_colours_and_greys_ignored_pixels():
    mask = SQUARE.copy()
    mask[:, 50:] = 255
    shown = plots.overlay(GREY, mask, [(255, 0, 0), None])
    assert (shown[12:28, 12:28] == 100).all()
    assert count(shown, solid(plots.FILL, (255, 0, 0), 100)) > 1000
    assert set(map(tuple, shown[:, 50:].reshape(-1, 3))) == {(90, 90, 90), (117, 117, 117)}  # stripes on grey


@pytest.mark.parametrize("value", [0, 1, 254])
def test_overlay_of_one_class_or_none(value):
    shown = plots.overlay(GREY, np.full((40, 60), value, np.uint8))
    assert (shown == 100).all() == (value == 0)


@pytest.mark.parametrize(
    ("dtype", "channels", "low", "high"),
    [
        *((np.uint8, 1, 0, 255), (np.uint8, 2, 0, 255), (np.uint8, 3, 0, 255), (np.uint16, 5, 900, 4000)),
        *((np.float32, 1, -0.5, 0.5), (np.float32, 4, 0, 1e9), (np.uint8, 3, 0, 9), (np.float64, 3, 0, 1)),
    ],
)
def test_any_image_is_shown_with_contrast(dtype, channels, low, high):
    ramp = np.linspace(low, high, 40 * 60).reshape(40, 60, 1)
    shown = plots.to_display(np.repeat(ramp, channels, axis=2).astype(dtype))
    assert shown.shape == (40, 60, 3)
    assert shown.dtype == np.uint8
    assert shown.min() == 0
    assert shown.max() >= 250
    assert (np.diff(shown[..., 0].ravel().astype(int)) >= 0).all()


def test_ordinary_pictures_are_shown_as_they_are():
    image = np.random.default_rng(0).integers(20, 200, (30, 30, 3)).astype(np.uint8)
    assert np.array_equal(plots.to_display(image), image)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [0, 7, np.nan, np.inf])
def test_constant_and_unreal_images_are_black(value):
    assert (plots.to_display(np.full((9, 9, 3), value, np.float32)) == 0).all()


@pytest.mark.filterwarnings("error")
def test_unreal_pixels_do_not_spoil_the_stretch():
    image = np.linspace(0, 1, 900, dtype=np.float32).reshape(30, 30, 1)
    image[3, 3], image[4, 4] = np.nan, np.inf
    shown = plots.to_display(image)
    assert shown[3, 3, 0] == shown[4, 4, 0] == 0
    assert shown[29, 29, 0] >= 250


def test_panel_colours_hits_false_alarms_and_misses():
    pred = np.roll(SQUARE, 5, axis=1)
    black = np.zeros((40, 60, 1), np.uint8)
    panel = plots.sample_panel(black, SQUARE, pred, None, NAMES, "t")
    zoom = 4  # 60 pixels are shown on 240
    backdrop = 0.15 * 255
    assert count(panel, solid(0.9, plots.FALSE_POSITIVE, backdrop)) == 20 * 5 * zoom**2
    assert count(panel, solid(0.9, plots.FALSE_NEGATIVE, backdrop)) == 20 * 5 * zoom**2
    assert count(panel, solid(0.45, plots.TRUE_POSITIVE, backdrop)) == 20 * 15 * zoom**2


def test_panel_of_several_classes_marks_wrong_pixels_that_count():
    mask = np.zeros((240, 240), np.uint8)
    mask[:100], mask[100:120] = 2, 255
    pred = np.zeros_like(mask)
    pred[:150] = 2
    black = np.zeros((240, 240, 3), np.uint8)
    panel = plots.sample_panel(black, mask, pred, None, ("sky", "road", "tree"), "t")
    assert count(panel, solid(0.85, plots.WRONG, 0.15 * 255)) == 30 * 240  # the 20 ignored rows are not wrong


@pytest.mark.parametrize(
    ("with_mask", "with_probs", "tiles"), [(True, True, 5), (True, False, 4), (False, True, 3), (False, False, 2)]
)
def test_panel_has_a_tile_for_what_is_known(with_mask, with_probs, tiles):
    mask = SQUARE if with_mask else None
    probs = SQUARE[None].astype(np.float32) if with_probs else None
    panel = plots.sample_panel(GREY, mask, SQUARE, probs, NAMES, "t")
    assert panel.shape[1] == plots.GAP + tiles * (240 + plots.GAP)


@pytest.mark.parametrize("size", [(1, 1), (3, 500), (900, 20), (1, 3000), (2900, 3100), (701, 700)])
def test_panels_of_any_size(size):
    mask = np.zeros(size, np.uint8)
    panel = plots.sample_panel(np.zeros((*size, 1), np.uint16), mask, mask, mask[None] * 0.5, NAMES, "t" * 500)
    assert panel.dtype == np.uint8
    assert panel.shape[0] <= plots.TILE_SIDE + 150
    assert panel.shape[1] <= 5 * (plots.TILE_SIDE + plots.GAP) + plots.GAP


def test_a_thin_line_survives_shrinking():
    mask = np.zeros((2000, 2000), np.uint8)
    mask[1000:1003] = 1
    panel = plots.sample_panel(np.zeros((2000, 2000, 3), np.uint8), mask, mask, None, NAMES, "")
    truth = panel[60:760, 2 * 710 + plots.GAP : 2 * 710 + plots.GAP + 700]
    assert (truth.max(axis=(0, 2)) > 100).all()  # in every column


def test_titles_and_names_hold_any_letters_and_many_classes_get_a_legend():
    names = ["background", *(f"класс {i}" for i in range(30))]
    mask = np.arange(31, dtype=np.uint8).repeat(40).reshape(31, 40)
    plain, cyrillic, other = (plots.sample_panel(mask, mask, mask, None, names, t) for t in ("", "сосуды", "клетки"))
    assert plain.shape == cyrillic.shape
    assert not np.array_equal(cyrillic, plain)
    assert not np.array_equal(cyrillic, other)  # letters, not the same box for each
    assert len(set(plots.class_colours(names))) == 31
    assert plain.shape[0] > 60 + 186 + 3 * 24  # the legend takes several rows
    for colour in plots.class_colours(names)[1:]:
        assert count(plain, colour) >= 13 * 13


def test_panel_refuses_other_sizes():
    with pytest.raises(ValueError, match=r"pred is \(40, 61\) but the image is \(40, 60\): expected equal sizes"):
        plots.sample_panel(GREY, SQUARE, np.zeros((40, 61), np.uint8), None, NAMES, "t")


def make_history(epochs):
    history = []
    for epoch in range(1, epochs + 1):
        scores = {"loss": 1 / epoch, "iou": 1 - 1 / epoch if epoch != epochs else 0.1, "dice": 0.5}
        row = {"epoch": epoch, "lr": 1e-3 / epoch, "train": {"loss": 1 / epoch, "iou": 0.5}, "val": {"вода": scores}}
        if epoch % 2:
            row["val"]["extra"] = {"loss": float("nan"), "iou": None}
        history.append(row | {"seconds": 1.5})
    return history


def test_learning_curves_are_pictures_in_the_folder(tmp_path):
    files = plots.learning_curves(make_history(6), tmp_path / "new run")
    assert [file.name for file in files] == ["loss.png", "iou.png", "learning_rate.png"]
    assert sorted(file.name for file in (tmp_path / "new run").iterdir()) == sorted(file.name for file in files)
    for file in files:
        picture = cv2.imdecode(np.fromfile(file, np.uint8), cv2.IMREAD_COLOR)
        assert picture.shape == (495, 880, 3)
        assert picture.std() > 5
    before = files[0].read_bytes()
    plots.learning_curves(make_history(2), tmp_path / "new run")
    assert files[0].read_bytes() != before


def test_the_best_epoch_is_that_of_the_first_validation_set():
    assert plots._best_epoch(make_history(6)) == 5
    without_val = [{"epoch": e, "lr": 0.1, "train": {"loss": 1.0, "iou": e % 3}, "val": {}} for e in (1, 2, 3)]
    assert plots._best_epoch(without_val) == 2


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("row", [make_history(1)[0], {"epoch": 1, "lr": 0.1, "train": {"loss": None}}])
def test_curves_of_one_epoch_and_of_missing_values(tmp_path, row):
    assert all(file.stat().st_size > 5000 for file in plots.learning_curves([row], tmp_path))


def test_curves_need_an_epoch(tmp_path):
    with pytest.raises(ValueError, match="no epochs to plot"):
        plots.learning_curves([], tmp_path)
