"""Layers that are replaced before an export compute what they computed."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import onnx_export
from checkpoint import Geometry, ModelConfig
from export_graph import Shell, wrap_network
from export_layers import BinMeans, make_exportable, share_weights
from export_proof import ENOUGH_SPREAD, model_runner, prove_file, randomise_statistics
from model import build_model
from onnx_export import ExportError, Form, export_network


def kinds_of(network):
    return {type(layer).__name__ for layer in network.modules()}


def mean_of_bins(features, bins):
    """Adaptive average pooling by its definition."""
    height, width = features.shape[2:]
    result = np.empty((*features.shape[:2], *bins))
    for row in range(bins[0]):
        for column in range(bins[1]):
            top, bottom = row * height // bins[0], -(-(row + 1) * height // bins[0])
            left, right = column * width // bins[1], -(-(column + 1) * width // bins[1])
            result[:, :, row, column] = features[:, :, top:bottom, left:right].mean(axis=(2, 3))
    return result


@pytest.mark.parametrize("bins", [1, 2, 3, 6, (3, 5)], ids=str)
def test_means_over_bins_are_those_of_adaptive_pooling(bins):
    rng = np.random.default_rng(0)
    for size in ((1, 1), (2, 7), (5, 3), (6, 12), (13, 29), (64, 48)):
        features = rng.standard_normal((2, 3, *size)).astype(np.float32)
        found = BinMeans(bins)(torch.from_numpy(features)).numpy()
        np.testing.assert_allclose(found, mean_of_bins(features, (bins, bins) if isinstance(bins, int) else bins),
                                   atol=1e-6)  # fmt: skip
        np.testing.assert_allclose(found, nn.AdaptiveAvgPool2d(bins)(torch.from_numpy(features)), atol=1e-6)


@pytest.mark.parametrize(
    ("architecture", "encoder", "gone", "there"),
    [
        ("unet", "tu-tf_efficientnet_lite0", "Conv2dSame", "ZeroPad2d"),
        ("pspnet", "resnet18", "PSPBlock", "PooledContext"),
        ("upernet", "resnet18", "", "BinMeans"),
    ],
)
def test_networks_with_other_layers_compute_the_same(architecture, encoder, gone, there):
    torch.manual_seed(0)
    network = build_model(architecture, encoder, in_channels=3, num_logits=1).eval()
    before = kinds_of(network)
    changed = make_exportable(share_weights(network))
    assert kinds_of(network) == before and (not gone or gone in before), "the network itself stays as it was"
    assert there in kinds_of(changed) and gone not in kinds_of(changed)
    for height, width in ((32, 96), (160, 64)):
        image = torch.randn(1, 3, height, width)
        with torch.inference_mode():
            torch.testing.assert_close(changed(image), network(image), rtol=1e-4, atol=1e-4)


def test_a_copy_with_shared_weights_takes_no_second_set_of_them():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    shared = share_weights(network)
    assert shared is not network and shared[0] is not network[0]
    own = {tensor.data_ptr() for tensor in network.state_dict().values()}
    assert {tensor.data_ptr() for tensor in shared.state_dict().values()} == own
    assert copy.deepcopy(network)[0].weight.data_ptr() not in own


class OneSize(nn.Module):
    """A network of windows that are counted once and for all."""

    def __init__(self, side):
        super().__init__()
        self.side = side
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 1, 1))

    def forward(self, image):
        assert image.shape[2:] == (self.side, self.side), "one size alone"
        return self.body(image)


@pytest.mark.parametrize("side", [224, 320])
def test_a_network_that_takes_one_size_is_exported_and_proved_for_it(monkeypatch, side):
    monkeypatch.setattr(onnx_export, "_export_program", onnx_export._export_script)
    config = ModelConfig(
        *("unet", "resnet18", (1,), ("background", "object"), ("red", "green", "blue"), (0.0,) * 3, (1.0,) * 3),
        *(Geometry("crops", (side, side), side, 0, 0),),
        **{"stride": side, "min_side": side},
    )
    network = randomise_statistics(OneSize(side), config).eval()
    with pytest.raises(ExportError, match="one size alone"):
        export_network(network, config)
    model, shell = export_network(network, config, Form(size=(side, side))), Shell(size=(side, side))
    proof = prove_file(model_runner(wrap_network(model, config, shell)), network, config, shell)
    assert proof.spread > ENOUGH_SPREAD and proof.largest < 1e-4
