"""Pictures of what an encoder sees: components as colours that stay, neighbours, rows of networks."""

import numpy as np
import pytest
import torch
from torch import nn

from image_io import IGNORE_INDEX
from plots import comparison_row, picture_row
from selfsupervised import pictures
from selfsupervised.encoders import build_encoder
from selfsupervised.pictures import FeaturePictures, align, dense_features, principal_components, to_colours


class Maps(nn.Module):
    """An encoder whose features are made by a function of the images."""

    def __init__(self, make):
        super().__init__()
        self.weight, self.make = nn.Parameter(torch.zeros(1)), make

    def forward(self, images):
        return [images, *self.make(images)]


def reference(features):
    """Principal components by the covariance matrix, (h, w, 3), without signs."""
    flat = features.reshape(len(features), -1).double().numpy()
    flat = flat - flat.mean(axis=1, keepdims=True)
    values, vectors = np.linalg.eigh(flat @ flat.T)
    found = vectors[:, np.argsort(-values)[:3]].T @ flat
    return (found / found[0].std()).T.reshape(*features.shape[1:], -1)


def test_components_are_those_of_the_covariance_matrix():
    torch.manual_seed(0)
    features = torch.randn(6, 8, 9) * torch.tensor([5.0, 3.0, 2.0, 1.0, 0.5, 0.1])[:, None, None]
    found, expected = principal_components(features), reference(features)
    for k in range(3):
        gap = min(np.abs(found[..., k] - sign * expected[..., k]).max() for sign in (1, -1))
        assert gap < 1e-4
    assert list(found.std(axis=(0, 1))) == sorted(found.std(axis=(0, 1)), reverse=True)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_fewer_than_three_features(count):
    torch.manual_seed(0)
    components = principal_components(torch.randn(count, 6, 7))
    assert components.shape == (6, 7, 3)
    assert (components.std(axis=(0, 1)) > 0).sum() == count
    colours = to_colours(components)
    assert (colours[..., count:] == 127).all(), "what there is none of is grey"


@pytest.mark.parametrize("value", [0.0, 7.0, float("nan")])
def test_constant_features_are_grey(value):
    assert (to_colours(principal_components(torch.full((5, 6, 6), value))) == 127).all()


def test_an_offset_of_all_features_is_no_component():
    """Rounding of a large constant is not drawn as if it were structure."""
    torch.manual_seed(0)
    noise = 1e-5 * torch.randn(4, 8, 8)
    assert (principal_components(1e3 + noise) == 0).all()


def test_colours_do_not_flip_between_epochs():
    torch.manual_seed(0)
    features = torch.randn(5, 12, 12) * torch.tensor([4.0, 3.9, 1.0, 0.1, 0.1])[:, None, None]
    bright = np.random.default_rng(0).random((12, 12))
    first = align(principal_components(features), bright, None)
    # the second feature comes to be the strongest, and all signs turn round
    later = -features * torch.tensor([0.95, 1.05, 1.0, 1.0, 1.0])[:, None, None]
    raw = principal_components(later)
    again = align(raw, bright, first)
    for k in range(3):
        assert np.corrcoef(first[..., k].ravel(), again[..., k].ravel())[0, 1] > 0.9
    plain = [np.corrcoef(first[..., k].ravel(), raw[..., k].ravel())[0, 1] for k in range(3)]
    assert min(plain) < 0.5, "without it they would change"


def test_the_first_time_bright_places_are_high():
    bright = np.linspace(0, 1, 64).reshape(8, 8)
    components = np.stack([-bright, bright, -(bright**2)], axis=2).astype(np.float32)
    aligned = align(components, bright, None)
    assert all(np.corrcoef(aligned[..., k].ravel(), bright.ravel())[0, 1] > 0 for k in range(3))


def test_dense_features_lie_where_the_image_has_them():
    """A bright square is found in the features at its place, and the border of the image is no feature."""
    image = torch.zeros(1, 64, 64)
    image[:, 16:32, 40:56] = 1
    encoder = Maps(lambda x: [nn.functional.avg_pool2d(x, 4), nn.functional.avg_pool2d(x, 16)])
    features = dense_features(encoder, image)
    assert features.shape == (2, 16, 16)
    strong = features[0] > features[0].mean()
    assert strong[4:8, 10:14].all()
    assert int(strong.sum()) == 16
    counted = Maps(lambda x: [nn.functional.conv2d(x, torch.ones(1, 1, 33, 33), padding=16, stride=4)])
    even = dense_features(counted, torch.ones(1, 64, 64))
    assert float(even.std()) < 1e-4 * float(even.abs().max()), "zeros around an even image would show"


def test_an_encoder_of_one_size_is_shown_the_image_as_it_is():
    def only_64(images):
        if images.shape[-1] != 64:
            raise AssertionError("Input height (128) doesn't match model (64)")
        return [nn.functional.avg_pool2d(images, 8)]

    assert dense_features(Maps(only_64), torch.rand(3, 64, 64)).shape == (3, 8, 8)


def test_neighbours_are_of_other_images_and_most_alike_first():
    names = ["a", "a", "b", "c", "d"]
    alike = np.array([0.0, 0.99, 0.2, 0.9, 0.5])
    assert pictures.nearest(alike, 0, names, 2) == [3, 4]
    assert pictures.nearest(alike, 0, ["a"] * 5, 2) == [1, 3], "one image: its other windows"


def test_similarities_find_twins():
    torch.manual_seed(0)
    windows = torch.randn(6, 3, 16, 16)
    windows[4] = windows[1] + 0.01 * torch.randn(3, 16, 16)
    means = Maps(lambda x: [nn.functional.avg_pool2d(x, 8).flatten(1)[:, :, None, None]])
    table = pictures.similarities(means, windows)
    assert pictures.nearest(table[1], 1, list("abcdef"), 1) == [4]
    assert np.allclose(table, table.T)
    assert (np.abs(table) <= 1 + 1e-9).all()


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("count", [1, 2, 9])
def test_all_pictures_of_a_real_encoder(channels, count):
    torch.manual_seed(0)
    encoder = build_encoder("plain-8", channels).eval()
    windows, names = torch.randn(count, channels, 32, 32), [f"image {place % 4}" for place in range(count)]
    draw = FeaturePictures([100.0] * channels, [20.0] * channels)
    before = torch.get_rng_state()
    first, second = draw(encoder, windows, names), draw(encoder, windows, names)
    assert torch.equal(torch.get_rng_state(), before)
    assert set(first) == ({"Dense features", "Nearest neighbours"} if count > 1 else {"Dense features"})
    for tag, panels in first.items():
        for panel, again in zip(panels, second[tag], strict=True):
            assert panel.dtype == np.uint8
            assert panel.ndim == 3
            assert panel.shape[2] == 3
            assert (panel == again).all(), "the same encoder, the same picture"


def test_a_dark_window_does_not_show_its_noise():
    windows = torch.zeros(2, 1, 32, 32)
    windows[0] = torch.randint(0, 3, (32, 32)).float()  # of 255
    windows[1, 0, 8:24, 8:24] = 200
    dark, light = FeaturePictures([0.0], [1.0]).displayed(windows)
    assert dark.max() < 20
    assert light.max() > 190


def test_windows_are_chosen_from_different_images():
    names = ["a"] * 5 + ["b"] * 5 + ["c"] * 5
    assert {names[place] for place in pictures.spread_out(names, 3)} == {"a", "b", "c"}
    assert len(set(pictures.spread_out(names, 6))) == 6
    assert pictures.spread_out(["a"], 6) == [0]


def test_a_row_has_its_captions_and_refuses_other_sizes():
    tiles = [("a very long caption of a picture that is small " * 3, np.full((50, 50, 3), 90, np.uint8))] * 4
    row = picture_row(tiles, "title")
    assert row.shape[1] < 4 * 300
    at = row.shape[1] // 4
    assert (row[40:55, at - 8 : at] == 255).all(), "captions do not run into each other"
    with pytest.raises(ValueError, match="expected one size"):
        picture_row([("a", np.zeros((4, 4, 3), np.uint8)), ("b", np.zeros((4, 5, 3), np.uint8))], "")
    with pytest.raises(ValueError, match="0 pictures"):
        picture_row([], "")


def test_networks_are_compared_by_their_errors():
    image, mask = np.full((250, 250), 80, np.uint8), np.zeros((250, 250), np.uint8)
    mask[50:100, 50:100] = 1
    mask[200:, 200:] = IGNORE_INDEX
    wrong = np.zeros_like(mask)
    wrong[150:180, 50:100] = 1
    row = comparison_row(image, mask, {"right": mask % 255, "wrong": wrong}, ("background", "object"), "title")
    hits, false, missed = ((0, 158, 115), (213, 94, 0), (240, 228, 66))

    def near(colour, columns):
        gap = np.abs(row[60:310, columns].astype(int) - colour).sum(axis=2)
        return int((gap < 160).sum())

    second, third = slice(10 + 260, 10 + 510), slice(10 + 520, 10 + 770)
    assert near(hits, second) > 2000
    assert near(false, second) == near(missed, second) == 0
    assert near(false, third) >= 1500
    assert near(missed, third) >= 2500
    with pytest.raises(ValueError, match="wrong is"):
        comparison_row(image, mask, {"wrong": wrong[:10]}, ("background", "object"), "")
