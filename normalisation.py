"""Statistics that images are normalised with: computed from a scan, kept in mean_vals.txt, compared with new data."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from checkpoint import ModelConfig
from image_io import write_text
from pairing import DatasetError
from scan import PairFacts
from unlike import Told, intensity_findings, mean_range

STATISTICS_FILE = "mean_vals.txt"


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation per channel in network order and raw units, and the ranges of values and of means.

    image_means: lowest and highest mean of an image, as in ModelConfig.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    value_range: tuple[tuple[float, ...], tuple[float, ...]]
    image_means: tuple[tuple[float, ...], tuple[float, ...]]
    source: str


def statistics(facts: Sequence[PairFacts]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation per channel over all pixels with data, (C,) float64, in network order.

    Raises:
        DatasetError: there is no such pixel.
    """
    whole = [item.layers for item in facts if item.has_data]
    if not whole:
        raise DatasetError("no image has a pixel with data, so there are no statistics; check the nodata values")
    pixels = np.array([[layer.pixels for layer in layers for _ in layer.means] for layers in whole])  # (I, C)
    means = np.array([[mean for layer in layers for mean in layer.means] for layers in whole])
    spreads = np.array([[spread for layer in layers for spread in layer.spreads] for layers in whole])
    total = pixels.sum(axis=0)
    mean = (pixels * means).sum(axis=0) / total
    return mean, np.sqrt((spreads + pixels * (means - mean) ** 2).sum(axis=0) / total)


def image_mean(item: PairFacts) -> list[float]:
    """Mean of each channel of one image, in network order."""
    return [mean for layer in item.layers for mean in layer.means]


def value_range(facts: Sequence[PairFacts]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Lowest and highest value of each channel: 0 and 255 for 8 bit, else from 0 (or less) to what the files hold."""
    low: list[float] = []
    high: list[float] = []
    for place, first in enumerate(facts[0].layers):
        layers = [item.layers[place] for item in facts if item.layers[place].pixels]
        eight_bit = all(layer.dtype == "uint8" for layer in layers)
        least, most = min(layer.low for layer in layers), max(layer.high for layer in layers)
        low += [0.0 if eight_bit else min(0.0, least)] * first.channels
        high += [255.0 if eight_bit else most if most > min(0.0, least) else least + 1.0] * first.channels
    return tuple(low), tuple(high)


def digest(facts: Sequence[PairFacts], steps: Sequence[str]) -> str:
    """Short name of what statistics were computed from: folders, file names and sizes of the fold, preprocessing."""
    paths = [path for item in facts for path in item.pair.layers]
    words = [f"{path.parent.name}/{path.name}:{path.stat().st_size}" for path in paths]
    words += sorted({item.sampled for item in facts if item.sampled})
    return hashlib.sha256("|".join([*sorted(words), *steps]).encode()).hexdigest()[:16]


def load_or_compute_statistics(
    root: Path, run_dir: Path, facts: Sequence[PairFacts], steps: Sequence[str]
) -> Statistics:
    """Statistics of the training split, from <root>/mean_vals.txt if it belongs to these files, else computed.

    The file holds two lines of numbers, mean and std, in the order B G R extras when the images are RGB, then a
    comment with the digest. One without a digest was given by the user and is taken as it is. A file that belongs to
    other data is left alone: the statistics then go into the run folder, as they do when `root` cannot be written.

    Raises:
        DatasetError: a file that is there is not what it should be, or no pixel has data.
    """
    mark, extent = digest(facts, steps), value_range(facts)
    means = mean_range([image_mean(item) for item in facts if item.has_data])
    sampled = sorted({item.sampled for item in facts if item.sampled})
    note = f"; estimated from {' and '.join(sampled)}" if sampled else ""
    order = _file_order(facts)
    own, other = run_dir / STATISTICS_FILE, root / STATISTICS_FILE
    for place in (other, own):
        if place.is_file():
            mean, std, found = read_statistics(place)
            if len(mean) == len(order) and found in (mark, None):
                source = f"{place}{note}" if found else f"{place} (no digest in it, taken as given)"
                return Statistics(tuple(mean[order].tolist()), tuple(std[order].tolist()), extent, means, source)
    mean, std = statistics(facts)
    text = _statistics_text(mean[order], std[order], mark, steps)
    target = own if other.exists() else _write_first(text, other, own)
    if target == own:
        write_text(own, text)
    mean, std, _ = read_statistics(target)  # with the digits in the file, so that every later run has the same
    source = f"computed, kept in {target}{note}"
    return Statistics(tuple(mean[order].tolist()), tuple(std[order].tolist()), extent, means, source)


def _write_first(text: str, wish: Path, instead: Path) -> Path:
    """Write to `wish`; where that is not possible, say that it goes `instead`."""
    try:
        write_text(wish, text)
    except OSError:
        return instead
    return wish


def _file_order(facts: Sequence[PairFacts]) -> list[int]:
    """Where each channel of mean_vals.txt stands in network order; B G R against R G B is its own inverse."""
    count = sum(layer.channels for layer in facts[0].layers)
    return [2, 1, 0, *range(3, count)] if facts[0].channels == 3 else list(range(count))


def _statistics_text(mean: np.ndarray, std: np.ndarray, mark: str, steps: Sequence[str]) -> str:
    lines = [" ".join(f"{value:.9g}" for value in row) for row in (mean, std)]
    note = f"# digest {mark}; order B G R extras, or that of the bands; preprocess {'+'.join(steps) or 'none'}"
    return "\n".join([*lines, note]) + "\n"


def read_statistics(path: Path) -> tuple[np.ndarray, np.ndarray, str | None]:
    """Mean, std and digest (None if there is none) of a mean_vals.txt, in file order.

    Raises:
        DatasetError: not two lines of as many numbers.
    """
    remedy = "expected a line of means and a line of deviations; delete it to compute it anew"
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        rows = [np.array([float(word) for word in line.split()]) for line in lines if not line.startswith("#")]
    except ValueError as error:
        raise DatasetError(f"{path} is not a list of numbers ({error}); {remedy}") from error
    if len(rows) != 2 or len(rows[0]) != len(rows[1]):
        raise DatasetError(f"{path} has lines of {[len(row) for row in rows]} numbers; {remedy}")
    if not np.isfinite(rows).all() or (rows[1] < 0).any():
        raise DatasetError(f"{path} holds NaN, infinity or a negative deviation; {remedy}")
    marks = [line.split()[2].rstrip(";") for line in lines if line.startswith("# digest ")]
    return rows[0], rows[1], marks[0] if marks else None


def channel_names(facts: Sequence[PairFacts], add_dirs: Sequence[str]) -> tuple[str, ...]:
    """Names of the channels in network order."""
    count = facts[0].channels
    own = {1: ("grey",), 3: ("red", "green", "blue")}.get(count) or tuple(f"band{i + 1}" for i in range(count))
    return (*own, *add_dirs)


def scene_warnings(facts: Sequence[PairFacts], config: ModelConfig) -> list[str]:
    """Images that differ from what a network was trained on: another pixel type, intensities far off, nothing in them.

    A line for each kind of difference, with the number of images.
    """
    kinds = {item.layers[0].dtype for item in facts if item.layers[0].dtype}
    if kinds - {config.dtype}:
        return [f"images are {' '.join(sorted(kinds))}, the network was trained on {config.dtype}"]
    seen = [item for item in facts if item.has_data and len(image_mean(item)) == len(config.mean)]
    told, lines = Told(), list[str]()
    for item in seen:
        constant = not any(spread for layer in item.layers for spread in layer.spreads)
        for finding in intensity_findings(config, np.array(image_mean(item)), constant=constant):
            told.tell(lines.append, item.pair.name, finding)
    warnings = [f"{count} of {len(seen)} images, such as {name}: {text}" for count, name, text in told.kinds()]
    if seen and config.image_means is None:  # an older file: what all images are together is known
        mean, _ = statistics(seen)
        gap = np.abs(mean - np.array(config.mean)) / np.maximum(np.array(config.std), 1e-6)
        if gap.max() > 2 and not warnings:
            warnings.append(
                f"mean intensity {np.round(mean, 1).tolist()} is {gap.max():.1f} deviations from the training's "
                f"{np.round(config.mean, 1).tolist()}: expect worse results"
            )
    return warnings
