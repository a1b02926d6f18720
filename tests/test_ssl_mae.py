"""Masked autoencoding: what is hidden stays hidden, the loss is the paper's, orders are random and repeatable."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from selfsupervised import mae
from selfsupervised.encoders import build_encoder, feature_maps
from selfsupervised.interface import MethodOptions
from selfsupervised.methods import build_method
from selfsupervised.pictures import FeaturePictures

ENCODER = "tu-test_vit"  # patches of 16 pixels, width 64, 6 blocks, a class token


def make(channels=3, mask=0.75, encoder=ENCODER):
    torch.manual_seed(0)
    return build_method("mae", build_encoder(encoder, channels), MethodOptions(mask_share=mask)).train()


def make_places(count, seed=0):
    return torch.randn(count, 2, 2, 3, generator=torch.Generator().manual_seed(seed))


def make_order(count, patches, seed=0):
    return mae.patch_order(make_places(count, seed)[:, 0], patches)


def change(images, patch, columns):
    """Other pixels in one patch of every image."""
    row, column = divmod(patch, columns)
    changed = images.clone()
    changed[:, :, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] += 3
    return changed


@pytest.mark.parametrize("channels", [1, 5])
def test_the_loss_is_that_of_the_paper(channels):
    """Patch by patch in float64: hidden ones alone, against pixels of mean 0 and variance 1."""
    method = make(channels)
    views, places = torch.randn(2, 3, channels, 48, 64), make_places(3)
    step = method(*views, places)
    images, order = torch.cat((views[0], views[1])), mae.patch_order(torch.cat((places[:, 0], places[:, 1])), 12)
    guessed, _ = method.guess(images, order)
    errors, spread = [], []
    for image, guesses, numbers in zip(images.double().numpy(), guessed.detach().numpy(), order.tolist(), strict=True):
        assert len(set(numbers[:3])) == 3, "a quarter of 12 is seen"
        for number in numbers[3:]:
            row, column = divmod(number, 4)
            patch = image[:, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16].reshape(-1)
            target = (patch - patch.mean()) / math.sqrt(patch.var(ddof=1) + mae.FLOOR)
            errors.append(((guesses[number] - target) ** 2).mean())
            spread.append((target**2).mean())
    assert float(step.loss.detach()) == pytest.approx(np.mean(errors), rel=1e-5)
    assert float(step.scores["explained"]) == pytest.approx(1 - np.mean(errors) / np.mean(spread), abs=1e-5)
    assert step.embeddings.shape == (3, 64)


def test_hidden_patches_are_not_seen():
    method = make().eval()
    images, order = torch.randn(1, 3, 64, 64), make_order(1, 16)
    with torch.no_grad():
        before, _ = method.guess(images, order)
        for number in order[0, 4:].tolist():
            assert torch.equal(method.guess(change(images, number, 4), order)[0], before), number
        for number in order[0, :4].tolist():
            assert not torch.allclose(method.guess(change(images, number, 4), order)[0], before, atol=1e-3), number


def test_the_order_within_the_seen_and_the_hidden_is_of_no_account():
    """Attention knows places by their positions alone, so everything must come back to its own place."""
    method = make().eval()
    images, order = torch.randn(2, 3, 64, 64), make_order(2, 16)
    seen, hidden = order[:, :4], order[:, 4:]
    with torch.no_grad():
        expected, _ = method.guess(images, order)
        other, _ = method.guess(images, torch.cat((seen.flip(1), hidden[:, torch.randperm(12)]), dim=1))
        swapped, _ = method.guess(images, torch.cat((hidden[:, :4], seen, hidden[:, 4:]), dim=1))
    assert torch.allclose(other, expected, atol=1e-5)
    assert not torch.allclose(swapped, expected, atol=1e-3)


def test_the_encoder_itself_sees_everything():
    """As it was before it was given to the method, and under the names that train.py has."""
    encoder = build_encoder(ENCODER, 3).eval()
    images, names = torch.randn(2, 3, 64, 64), list(encoder.state_dict())
    before = feature_maps(encoder, images)
    method = build_method("mae", encoder, MethodOptions())
    method(images, images, make_places(2))
    assert all(map(torch.equal, before, feature_maps(encoder, images)))
    assert list(encoder.state_dict()) == names
    with pytest.raises(RuntimeError):
        method(images[:, :1], images[:, :1], make_places(2))
    assert all(map(torch.equal, before, feature_maps(encoder, images))), "after an error too"


@pytest.mark.parametrize("name", ["tu-deit_tiny_distilled_patch16_224", "tu-vit_small_patch14_dinov2"])
def test_other_transformers_with_their_tokens(name):
    """Two class tokens; patches of 14 pixels."""
    method = make(encoder=name, mask=0.5)
    side = 4 * method.side
    views = torch.randn(2, 1, 3, side, side)
    step = method(*views, make_places(1))
    step.loss.backward()
    idle = {name for name, weight in method.named_parameters() if weight.requires_grad and weight.grad is None}
    assert all("head" in name for name in idle), idle
    assert method.complete(views[0])["completed"].shape == (1, 3, side, side)


def test_orders_are_random():
    """Of 20000 views: every patch is as often seen, every pair of patches as often together."""
    order = make_order(20000, 16).numpy()
    assert (np.sort(order, axis=1) == np.arange(16)).all()
    seen = np.zeros((len(order), 16))
    np.put_along_axis(seen, order[:, :4], 1, axis=1)
    together = seen.T @ seen
    singles, pairs = together.diagonal(), together[np.triu_indices(16, 1)]
    assert stats.chisquare(singles).pvalue > 1e-3
    assert stats.chisquare(pairs).pvalue > 1e-3
    assert (
        stats.chisquare(
            np.bincount(order[:, 0] * 16 + order[:, 1], minlength=256).reshape(16, 16)[~np.eye(16, dtype=bool)]
        ).pvalue
        > 1e-3
    )


def test_orders_depend_on_the_view_alone():
    places = make_places(50)
    whole = mae.patch_order(places[:, 0], 49)
    assert torch.equal(torch.cat([mae.patch_order(part, 49) for part in places[:, 0].split(7)]), whole)
    near = places[:, 0].clone()
    near[:, 1, 2] = torch.nextafter(near[:, 1, 2], torch.tensor(9.0))
    shared = (mae.patch_order(near, 49) == whole).float().mean()
    assert shared < 0.06, "one in 49 by chance"


def test_patches_are_cut_and_joined_and_normalised():
    images = torch.randn(2, 3, 32, 48)
    patches = mae.cut_patches(images, 16)
    assert patches.shape == (2, 6, 768)
    assert torch.equal(patches[1, 4].view(3, 16, 16), images[1, :, 16:, 16:32])
    assert torch.equal(mae.join_patches(patches, images.shape, 16), images)
    normal, mean, deviation = mae.normalise_patches(patches)
    assert torch.allclose(normal.mean(2), torch.zeros(2, 6), atol=1e-6)
    assert torch.allclose(normal.var(2), torch.ones(2, 6), atol=0.02)
    assert torch.allclose(normal * deviation + mean, patches, atol=1e-5)
    flat = torch.tensor((-0.697, -0.688, -0.688)).repeat_interleave(256)[None, None]  # black, each channel normalised
    noise = flat + 0.01 * torch.randn(1, 2, 768)
    assert mae.normalise_patches(flat)[0].abs().max() < 0.1, "an empty patch has nothing to guess"
    assert mae.normalise_patches(noise)[0].std() < 0.15, "nor has one with noise of a grey level"


def test_a_true_guess_completes_the_image(monkeypatch):
    method = make().eval()
    images = torch.randn(2, 3, 64, 64)
    truth, _, _ = mae.normalise_patches(mae.cut_patches(images, 16))
    monkeypatch.setattr(method, "guess", lambda images, order: (truth, None))
    made = method.complete(images)
    assert torch.allclose(made["completed"], images, atol=1e-5)
    middle = (images.amin((2, 3)) + images.amax((2, 3))) / 2
    grey = mae.cut_patches(middle[..., None, None].expand_as(images), 16)
    empty = (mae.cut_patches(made["visible"], 16) - grey).abs().le(1e-6).all(2)
    assert empty.sum(1).tolist() == [12, 12]
    kept = mae.cut_patches(made["visible"], 16)[~empty]
    assert torch.equal(kept, mae.cut_patches(images, 16)[~empty])


def test_it_learns_what_can_be_known():
    """Slopes of one direction an image: what is hidden follows from what is seen."""
    method, generator = make(1), torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW(method.parameters(), 1e-3)
    place = torch.stack(torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij"))
    explained = []
    for step in range(60):
        turn = torch.rand(2, 8, generator=generator) * 2 * math.pi
        views = (turn.sin()[..., None, None] * place[0] + turn.cos()[..., None, None] * place[1])[:, :, None] / 20
        result = method(*views, make_places(8, step))
        optimiser.zero_grad()
        result.loss.backward()
        optimiser.step()
        explained.append(float(result.scores["explained"]))
    assert np.mean(explained[-5:]) > 0.5 > np.mean(explained[:5]), (explained[:5], explained[-5:])


@pytest.mark.parametrize("encoder", ["plain-8", "resnet18", "tu-eva02_tiny_patch14_224", "tu-convnext_atto"])
def test_encoders_without_patches_to_hide_are_refused(encoder):
    with pytest.raises(
        ValueError, match=r"--method mae hides .* Give --encoder tu-vit_tiny_patch16_224 .*--method moco"
    ):
        build_method("mae", build_encoder(encoder, 3), MethodOptions())


def test_a_view_of_one_patch_is_refused():
    for side in (16, 31):
        with pytest.raises(ValueError, match=f"--image-size {side} leaves a single patch of 16 .* --image-size 96"):
            build_method("mae", build_encoder(ENCODER, 3), MethodOptions(side=side))
    build_method("mae", build_encoder(ENCODER, 3), MethodOptions(side=32))
    for mask in (0.01, 0.99):
        assert 1 <= make(mask=mask).count_visible(4) <= 3


def test_pictures_of_what_was_guessed():
    windows, names = torch.randn(9, 3, 32, 32), [f"image {place}" for place in range(9)]
    draw = FeaturePictures([100.0] * 3, [20.0] * 3)
    (picture,) = draw.completions(make().eval(), windows, names)["Completed windows"]
    assert picture.dtype == np.uint8 and picture.shape[2] == 3 and picture.shape[0] > 3 * 32
    moco = build_method("moco", build_encoder("plain-8", 3), MethodOptions())
    assert draw.completions(moco, windows, names) == {}
