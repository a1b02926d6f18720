"""Whether an exported file gives what PyTorch gives, from raw pixels to masks; files that do not are not kept."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from checkpoint import ModelConfig
from export_graph import Shell, pad_to
from image_io import normalise
from model import to_probabilities
from onnx_export import LARGEST_DIFFERENCE, SMALLEST_SPREAD, ExportError, make_session, session_runner
from outputs import decide
from tiling import reflect_index, round_up

MEAN_DIFFERENCE = 1e-4  # of logits in units of their spread
LEAST_AGREEMENT = 0.9999  # of the pixels of masks
ENOUGH_SPREAD = 0.1  # of logits; below it a network with random normalisation statistics is proved beside the real one
SIDE = 256  # about, of the noise by which logits are scaled
PROBABILITY_SPREAD = 0.1  # at least, where probabilities hardly vary: float32 near 1 has no more digits


@dataclass(frozen=True)
class Proof:
    """What was compared: differences in units of the spread, share of equal mask pixels, pixels, the spread itself."""

    largest: float
    mean: float
    agreement: float
    pixels: int
    spread: float


def prove_file(
    run: Callable[[np.ndarray], np.ndarray],
    network: nn.Module,
    config: ModelConfig,
    shell: Shell,
    tiles: Sequence[np.ndarray] = (),
) -> Proof:
    """Compare what a file gives with what the network gives by the code that every other command runs.

    Args:
        run: input of the file -> its output, see `model_runner`.
        network: on the CPU, in evaluation mode; images of sides that config allows.
        tiles: real images (H, W, C) of raw pixels, compared beside noise.

    Raises:
        ExportError: they differ, the message says by how much; or the logits hardly vary, so the proof is void.
    """
    sums = _Sums()
    for batch in [*noise_batches(config, shell), *tile_batches(config, shell, tiles)]:
        logits = reference(network, config, batch)
        taken = (
            np.stack(batch) if shell.pixels else np.stack([normalise(each, config.mean, config.std) for each in batch])
        )
        try:
            answer = run(np.ascontiguousarray(taken))
        except Exception as error:  # ONNX Runtime's errors have no common class
            size = "x".join(map(str, taken.shape))
            raise ExportError(
                f"the file cannot take a batch of {size}: {' '.join(str(error).split())[:200]}"
            ) from error
        sums.add(answer, logits, config, shell)
    return sums.judge(shell)


def model_runner(model: bytes) -> Callable[[np.ndarray], np.ndarray]:
    """What ONNX Runtime makes of a file on the CPU."""
    return session_runner(make_session(model, "cpu"))


def reference(network: nn.Module, config: ModelConfig, images: Sequence[np.ndarray]) -> np.ndarray:
    """Logits (N, K, H, W) of images (H, W, C) of one size, padded as tiling.py pads them and cut again."""
    batch = np.stack([normalise(image, config.mean, config.std) for image in images])
    height, width = batch.shape[2:]
    for axis, side in ((2, height), (3, width)):
        batch = batch.take(reflect_index(side, round_up(max(side, config.min_side), config.stride)), axis=axis)
    with torch.inference_mode():
        return network(torch.from_numpy(np.ascontiguousarray(batch))).numpy()[..., :height, :width]


def noise_batches(config: ModelConfig, shell: Shell) -> list[list[np.ndarray]]:
    """Images of three sizes, among them odd ones and a single pixel, in two batches each; or of the only size."""
    rng = np.random.default_rng(0)
    least, stride = round_up(config.min_side, config.stride), config.stride
    sizes = [(1, 1), (least + 1, 3 * stride - 1), (max(least, 3 * stride) + stride - 3, 2 * least + stride + 5)]
    shapes = [(number, size) for size in sizes for number in (1, 3)]
    if shell.size:
        shapes = [(1, shell.size), (1, shell.size)]
    kind = np.dtype(shell.pixels or "float32")
    top = np.iinfo(kind).max if kind.kind == "u" else np.inf
    low = 0 if kind.kind == "u" else -np.inf
    mean, std = np.array(config.mean), np.maximum(np.array(config.std), 1e-6)

    def image(height: int, width: int) -> np.ndarray:
        values = rng.standard_normal((height, width, len(mean))) * std + mean
        return np.clip(np.rint(values) if kind.kind == "u" else values, low, top).astype(kind)

    return [[image(*size) for _ in range(number)] for number, size in shapes]


def agree_in_half(
    model: bytes, half: bytes, config: ModelConfig, batches: Sequence[np.ndarray], size: tuple[int, int] | None
) -> float:
    """Share of mask pixels that two bare networks decide alike, on normalised batches or, without any, on noise.

    Args:
        size: the only one that they take. Numbers that are not finite agree with nothing.
    """
    if not batches:
        side = max(round_up(config.min_side, config.stride), SIDE // config.stride * config.stride)
        noise = np.random.default_rng(0).standard_normal((1, len(config.channels), *(size or (side, side))))
        batches = [noise.astype(np.float32)]
    runs, equal, pixels = [model_runner(each) for each in (model, half)], 0, 0
    for batch in batches:
        whole = pad_to(batch, size) if size else batch
        logits = [run(whole) for run in runs]
        wanted, found = (np.stack([decide(each, 0.5) for each in _activate(part, config)]) for part in logits)
        equal += int(((wanted == found) & np.isfinite(logits[1]).all(axis=1)).sum())
        pixels += wanted.size
    return equal / pixels


def tile_batches(config: ModelConfig, shell: Shell, tiles: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
    """Real tiles, one at a time, as the file takes them."""
    batches = []
    for tile in tiles:
        if shell.size:
            tile = tile.take(reflect_index(tile.shape[0], shell.size[0]), axis=0)
            tile = tile.take(reflect_index(tile.shape[1], shell.size[1]), axis=1)
        batches.append([tile.astype(shell.pixels) if shell.pixels else tile])
    return batches


class _Sums:
    """Adds up the comparisons of a proof."""

    def __init__(self) -> None:
        self.largest = self.total = self.variance = 0.0
        self.values = self.equal = self.pixels = self.counted = 0

    def add(self, answer: np.ndarray, logits: np.ndarray, config: ModelConfig, shell: Shell) -> None:
        """Compare one batch."""
        probs = _activate(logits, config)
        wanted = np.stack([decide(each, shell.threshold) for each in probs])
        expected = {"logits": logits, "probabilities": probs, "mask": wanted}[shell.output]
        if answer.shape != expected.shape:
            raise ExportError(f"the file gives {answer.shape}, the network {expected.shape}")
        masks = answer
        if shell.output != "mask":
            difference = np.abs(answer.astype(np.float64) - expected)
            self.largest = max(self.largest, float(difference.max()))
            self.total += float(difference.sum())
            values = answer if shell.output == "probabilities" else _activate(answer, config)
            masks = np.stack([decide(each, shell.threshold) for each in values])
        varied = probs if shell.output == "probabilities" else logits
        if varied[0, 0].size > 1:
            self.variance += float(varied.var(axis=(0, 2, 3), dtype=np.float64).mean()) * varied.size
            self.counted += varied.size
        self.values += expected.size
        self.equal += int((masks == wanted).sum())
        self.pixels += wanted.size

    def judge(self, shell: Shell) -> Proof:
        """The proof, or an error."""
        spread = float(np.sqrt(self.variance / max(self.counted, 1)))
        if not spread >= SMALLEST_SPREAD and shell.output == "logits":
            raise ExportError(
                f"the proof is void: the logits have a spread of {spread:.1e}, expected {SMALLEST_SPREAD:g} or more"
            )
        unit = max(spread, PROBABILITY_SPREAD) if shell.output == "probabilities" else spread
        largest, mean, agreement = self.largest / unit, self.total / self.values / unit, self.equal / self.pixels
        proof = Proof(largest, mean, agreement, self.pixels, spread)
        if not (largest <= LARGEST_DIFFERENCE and mean <= MEAN_DIFFERENCE and agreement >= LEAST_AGREEMENT):
            raise ExportError(
                f"the file's {shell.output} differ from the network's by {largest:.1e} of their spread at most and "
                f"{mean:.1e} on average, {agreement:.4%} of mask pixels agree; expected {LARGEST_DIFFERENCE:g}, "
                f"{MEAN_DIFFERENCE:g} and {LEAST_AGREEMENT:.2%}. That file was not written"
            )
        return proof


def _activate(logits: np.ndarray, config: ModelConfig) -> np.ndarray:
    return to_probabilities(torch.from_numpy(np.ascontiguousarray(logits)), config.activation).numpy()


def randomise_statistics(network: nn.Module, config: ModelConfig) -> nn.Module:
    """A copy with random normalisation statistics and a last layer that makes logits vary by more than ENOUGH_SPREAD.

    Errors of an export hide in networks that hardly react to their input, as untrained ones do.
    """
    network = copy.deepcopy(network)
    generator = torch.Generator().manual_seed(0)
    for layer in network.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is not None:
            layer.running_mean.normal_(0, 0.1, generator=generator)
            layer.running_var.uniform_(0.5, 1.5, generator=generator)  # type: ignore[union-attr]
            if layer.affine:
                layer.weight.data.uniform_(0.5, 1.5, generator=generator)
                layer.bias.data.normal_(0, 0.1, generator=generator)
    side = max(round_up(config.min_side, config.stride), SIDE // config.stride * config.stride)  # some take one alone
    spread = float(reference(network, config, noise_batches(config, Shell(size=(side, side)))[-1]).std())
    last = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)][-1]
    last.weight.data *= max(1.0, 0.5 / max(spread, 1e-6))
    return network
