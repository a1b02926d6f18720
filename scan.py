"""Look at every file of a data set once, in parallel and cached: what is wrong with it, its labels, its statistics."""

import argparse
import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from checkpoint import ModelConfig
from dataset import (
    MAX_LABEL,
    ClassMap,
    DatasetError,
    FileOptions,
    Listing,
    Pair,
    both_hold,
    find_splits,
    read_layer,
)
from image_io import ImageError, read_mask, read_orientation, write_text

CACHE_VERSION = 2
MANY_LABELS = 4096  # of one mask; those beyond are counted under its largest label
MANY_CLASSES = 250  # class indices are 8 bit, and some of them mean something else
SHOWN = 20  # labels that a message lists
SHOWN_ERRORS = 100  # that stop a training; the command that only checks lists more
STATISTICS_FILE = "mean_vals.txt"


@dataclass
class ImageFacts:
    """What one image file holds, after preprocessing.

    pixels: how many hold data. means and spreads: for each channel, over these pixels, the mean and the sum of squared
    differences from it. low and high: smallest and largest value.
    """

    size: tuple[int, int] = (0, 0)
    channels: int = 0
    dtype: str = ""
    orientation: int = 1
    pixels: int = 0
    means: list[float] = field(default_factory=list)
    spreads: list[float] = field(default_factory=list)
    low: float = 0.0
    high: float = 0.0
    error: str | None = None


@dataclass
class MaskFacts:
    """What one mask file holds: pixels of each value, [[value, count], ...], where the pixels count."""

    size: tuple[int, int] = (0, 0)
    orientation: int = 1
    labels: list[list[int]] = field(default_factory=list)
    error: str | None = None


@dataclass
class PairFacts:
    """Facts of one pair; `layers` are the image and its extra channels."""

    pair: Pair
    layers: list[ImageFacts]
    mask: MaskFacts | None
    roi: MaskFacts | None

    @property
    def channels(self) -> int:
        """Channels of the image file alone, without the extra ones."""
        return self.layers[0].channels

    @property
    def has_data(self) -> bool:
        """Whether every layer was read and has a pixel that counts."""
        return all(layer.pixels for layer in self.layers)


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation per channel in network order and raw units, and the range of the values."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    value_range: tuple[tuple[float, ...], tuple[float, ...]]
    source: str


# ----------------------------------------------------------------------------------------------------------------------
# Reading


def scan_pairs(
    pairs: Sequence[Pair], *, steps: Sequence[str] = (), workers: int | None = None, progress: bool = False
) -> list[PairFacts]:
    """Read every pair that the cache does not know with its files' present sizes and times.

    An interrupted scan keeps what it has read.

    Args:
        steps: preprocessing that the statistics belong to.
        workers: threads; None is one for each core.
        progress: show a bar on a terminal.
    """
    cache_path = _cache_path(pairs)
    cache = _read_cache(cache_path)
    keys = [_key(pair, steps) for pair in pairs]
    states = [[_state(path) for path in _files(pair)] for pair in pairs]
    fresh = [i for i, key in enumerate(keys) if cache.get(key, {}).get("state") != states[i]]
    if fresh:
        pool = ThreadPoolExecutor(workers or os.cpu_count())
        try:
            found = pool.map(lambda i: _scan_pair(pairs[i], steps), fresh)
            bar = tqdm(found, "checking files", len(fresh), leave=False, disable=None if progress else True, unit="img")
            for i, facts in zip(fresh, bar, strict=True):
                cache[keys[i]] = {"state": states[i], **facts}
        finally:
            pool.shutdown(cancel_futures=True)
            _write_cache(cache_path, cache)
    return [_from_cache(pair, cache[key]) for pair, key in zip(pairs, keys, strict=True)]


def _scan_pair(pair: Pair, steps: Sequence[str]) -> dict[str, Any]:
    layers, counted = [], None
    for place, path in enumerate(pair.layers):
        facts, valid = _scan_image(path, steps, extra=place > 0)
        layers.append(facts)
        counted = both_hold(counted, valid) if facts.size == layers[0].size else counted
    roi, inside = _scan_mask(pair.roi) if pair.roi else (None, None)
    if roi and roi.size == layers[0].size and inside is not None:
        counted = both_hold(counted, inside != 0)
    mask, values = _scan_mask(pair.mask) if pair.mask else (None, None)
    if mask and values is not None:
        same = counted is not None and counted.shape == values.shape
        mask.labels = count_labels(values[counted] if same else values)
    return {
        "layers": [asdict(facts) for facts in layers],
        **{"mask": mask and asdict(mask), "roi": roi and asdict(roi)},
    }


def _scan_image(path: Path, steps: Sequence[str], *, extra: bool) -> tuple[ImageFacts, np.ndarray | None]:
    try:
        image, valid = read_layer(path, steps, extra=extra)
        orientation = read_orientation(path)
    except (ImageError, OSError) as error:
        return ImageFacts(error=str(error)), None
    facts = ImageFacts(image.shape[:2], image.shape[2], str(image.dtype), orientation)
    pixels = image.reshape(-1, image.shape[2]) if valid is None else image[valid]  # (P, C)
    facts.pixels = len(pixels)
    if len(pixels):
        facts.low, facts.high = float(pixels.min()), float(pixels.max())
        facts.means, facts.spreads = moments(pixels)
    return facts, valid


def moments(pixels: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and sum of squared differences from it, for each channel of (P, C) uint8, uint16 or float32."""
    means, spreads = [], []
    weights: np.ndarray
    for channel in pixels.T:
        if channel.dtype.kind == "u":  # by value, each of which is exact
            weights = np.bincount(channel)
            values = np.arange(len(weights), dtype=np.float64)
        else:
            weights, values = np.ones(len(channel)), channel.astype(np.float64)
        mean = float(weights @ values / len(channel))
        means.append(mean)
        spreads.append(float(weights @ (values - mean) ** 2))
    return means, spreads


def _scan_mask(path: Path) -> tuple[MaskFacts, np.ndarray | None]:
    try:
        mask = read_mask(path)
        return MaskFacts(mask.shape[:2], read_orientation(path)), mask
    except (ImageError, OSError) as error:
        return MaskFacts(error=str(error)), None


def count_labels(values: np.ndarray) -> list[list[int]]:
    """[[value, pixels], ...] of mask values of any shape; see MANY_LABELS."""
    if values.dtype.itemsize <= 2:
        counts = np.bincount(values.ravel(), minlength=1)
        found = np.flatnonzero(counts)
        counts = counts[found]
    else:
        found, counts = np.unique(values, return_counts=True)
    if len(found) > MANY_LABELS:
        counts = np.append(counts[: MANY_LABELS - 1], counts[MANY_LABELS - 1 :].sum())
        found = np.append(found[: MANY_LABELS - 1], found[-1])
    return [[int(value), int(count)] for value, count in zip(found, counts, strict=True)]


def cache_dir() -> Path:
    """Folder of what can be computed again: $XDG_CACHE_HOME/tessera or ~/.cache/tessera."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tessera"


def _cache_path(pairs: Sequence[Pair]) -> Path:
    folder = str(pairs[0].image.parent.resolve()) if pairs else ""
    return cache_dir() / f"scan-{hashlib.sha256(folder.encode()).hexdigest()[:16]}.json"


def _files(pair: Pair) -> list[Path]:
    return [*pair.layers, *(path for path in (pair.mask, pair.roi) if path)]


def _key(pair: Pair, steps: Sequence[str]) -> str:
    layers = "|".join(str(path.resolve()) for path in pair.layers)
    mask, roi = (path.resolve() if path else "" for path in (pair.mask, pair.roi))
    return f"{'+'.join(steps)}|{layers}|mask {mask}|roi {roi}"


def _state(path: Path) -> list[int]:
    state = path.stat()
    return [state.st_size, state.st_mtime_ns]


def _from_cache(pair: Pair, entry: dict[str, Any]) -> PairFacts:
    def image(values: dict[str, Any]) -> ImageFacts:
        return ImageFacts(**{**values, "size": tuple(values["size"])})

    def mask(values: dict[str, Any] | None) -> MaskFacts | None:
        return values and MaskFacts(**{**values, "size": tuple(values["size"])})  # type: ignore[return-value]

    return PairFacts(pair, [image(layer) for layer in entry["layers"]], mask(entry["mask"]), mask(entry["roi"]))


def _read_cache(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # no cache yet, or one that was damaged: everything is read again
    known = isinstance(content, dict) and content.get("version") == CACHE_VERSION
    return content["pairs"] if known else {}


def _write_cache(path: Path, pairs: dict[str, Any]) -> None:
    try:
        write_text(path, json.dumps({"version": CACHE_VERSION, "pairs": pairs}))
    except OSError:
        return  # a read-only home only means that the next run reads the files again


# ----------------------------------------------------------------------------------------------------------------------
# Findings


def find_problems(listings: Sequence[Listing], facts: Sequence[PairFacts]) -> tuple[list[str], list[str]]:
    """Everything wrong with the files, whatever the classes are: (errors, warnings)."""
    errors = [message for listing in listings for message in listing.errors]
    warnings: list[str] = []
    for item in facts:
        errors += _pair_errors(item)
        for path, layer in zip(item.pair.layers, item.layers, strict=True):
            if layer.error is None and not layer.pixels:
                warnings.append(f"{path} has no pixel with data")
            elif layer.error is None and layer.low == layer.high:
                warnings.append(f"{path} is constant: every pixel is {layer.low:g}")
    errors += _mixed([(item.pair.image, f"{item.channels} channels") for item in facts if item.channels], "channels")
    for place in range(len(facts[0].layers) if facts else 0):
        layers = [(item.pair.layers[place], item.layers[place].dtype) for item in facts]
        warnings += _mixed([(path, dtype) for path, dtype in layers if dtype], "pixel types")
    return errors, warnings


def _pair_errors(item: PairFacts) -> list[str]:
    pair, image = item.pair, item.layers[0]
    others: list[tuple[Path, ImageFacts | MaskFacts]] = list(zip(pair.extras, item.layers[1:], strict=True))
    others += [(path, part) for path, part in ((pair.mask, item.mask), (pair.roi, item.roi)) if path and part]
    errors = [part.error for part in (image, *(part for _, part in others)) if part.error]
    for path, part in others:
        if image.error or part.error:
            continue
        if part.orientation != image.orientation and 1 in (part.orientation, image.orientation):
            errors.append(
                f"{pair.image} has EXIF orientation {image.orientation}, {path} has {part.orientation}: which way up "
                "they belong together is unknown. Save both with the same orientation, or both without."
            )
        elif part.size != image.size:
            errors.append(
                f"{path} is {part.size[0]}x{part.size[1]}, its image {pair.image} is "
                f"{image.size[0]}x{image.size[1]}; sizes must agree"
            )
    return errors


def _mixed(found: Sequence[tuple[Path, str]], what: str) -> list[str]:
    kinds: dict[str, list[Path]] = {}
    for path, kind in found:
        kinds.setdefault(kind, []).append(path)
    if len(kinds) < 2:
        return []
    listed = "; ".join(f"{kind}: {len(paths)} images, such as {paths[0]}" for kind, paths in kinds.items())
    return [f"images differ in {what}: {listed}. One data set needs the same {what} everywhere."]


# ----------------------------------------------------------------------------------------------------------------------
# Classes


@dataclass(frozen=True)
class ClassOptions:
    """Which mask values are learned.

    labels: such as "64 128", or "nonzero", or None: masks of 0 and x mean x. max_mask_val: learn 1 to N instead.
    mask_threshold: values above it are the object instead. ignore_label: a value that counts nowhere.
    """

    labels: str | None = None
    names: tuple[str, ...] = ()
    ignore_label: int | None = None
    mask_threshold: float | None = None
    max_mask_val: int = 0


def resolve_classes(options: ClassOptions, counts: Counter[int]) -> ClassMap:
    """Turn options into a ClassMap.

    Args:
        counts: pixels of each value in the training masks.

    Raises:
        DatasetError: labels that cannot be, a list that is needed, or names that do not fit.
    """
    if options.ignore_label is not None and not 0 <= options.ignore_label <= MAX_LABEL:
        raise DatasetError(f"--ignore-label {options.ignore_label} is out of range, expected 0 to {MAX_LABEL}")
    labels = _labels(options, counts)
    if len(labels) > MANY_CLASSES:
        raise DatasetError(f"{len(labels)} labels to learn, at most {MANY_CLASSES} are possible")
    implicit = [] if 0 in labels else ["background"]
    classes = [*implicit, *(map(str, labels) if len(labels) > 1 or not implicit else ["object"])]
    if len(classes) < 2:
        raise DatasetError("--class-list 0 alone leaves nothing to tell it from; add the labels of the other classes")
    if options.names:
        given = [*options.names] if len(options.names) == len(classes) else [*implicit, *options.names]
        if len(given) != len(classes) or len(set(given)) != len(given):
            expected = len(classes) - len(implicit)
            raise DatasetError(f"--class-names {' '.join(options.names)}: expected {expected} different names")
        classes = given
    limit = 0 if options.mask_threshold is not None else options.max_mask_val
    return ClassMap(labels, tuple(classes), options.ignore_label, options.mask_threshold, limit)


def _labels(options: ClassOptions, counts: Counter[int]) -> tuple[int, ...]:
    ignored = options.ignore_label
    if options.mask_threshold is not None:
        return ()
    if options.max_mask_val:
        return tuple(label for label in range(1, options.max_mask_val + 1) if label != ignored)
    if options.labels == "nonzero":
        return ()
    if options.labels:
        return _listed(options.labels, ignored)
    values = sorted(value for value in counts if value not in (0, ignored))
    if len(values) == 1:
        return (values[0],) if values[0] <= MAX_LABEL else ()
    if not values:
        raise DatasetError("every mask is empty (only label 0): there is nothing to learn; check the masks in gt/")
    raise DatasetError(f"the masks hold the labels 0 {_some(values)}, which needs a choice: {_ways(values)}")


def _some(values: Sequence[int]) -> str:
    return " ".join(map(str, values[:SHOWN])) + (f" ... {values[-1]}" if len(values) > SHOWN else "")


def _ways(values: Sequence[int]) -> str:
    """Flags that choose among mask values, the likeliest first."""
    flags = ["--class-list nonzero for instance maps", "--mask-threshold 127 for grey or JPEG masks"]
    if len(values) <= SHOWN:
        flags.insert(0, f"--max-mask-val {values[-1]} for all up to it")
        flags.insert(0, f'--class-list "{_some(values)}" (or a part of it) for classes')
    return ", ".join(flags)


def _listed(class_list: str, ignore_label: int | None) -> tuple[int, ...]:
    try:
        labels = tuple(int(word) for word in class_list.replace(",", " ").split())
    except ValueError:
        raise DatasetError(f'--class-list {class_list!r} must be labels such as "64 128", or nonzero') from None
    wrong = [label for label in labels if not 0 <= label <= MAX_LABEL]
    if wrong or not labels:
        found = f"label {wrong[0]} out of range" if wrong else "no label in it"
        raise DatasetError(f"--class-list {class_list!r}: {found}, expected 0 to {MAX_LABEL}")
    if len(set(labels)) != len(labels) or ignore_label in labels:
        raise DatasetError(f"--class-list {class_list!r} names a label twice, or the one of --ignore-label")
    return labels


def label_counts(facts: Sequence[PairFacts]) -> Counter[int]:
    """Pixels of each mask value over all masks, inside the regions of interest and where images have data."""
    counts: Counter[int] = Counter()
    for item in facts:
        for value, count in item.mask.labels if item.mask else []:
            counts[value] += count
    return counts


def find_label_problems(
    classes: ClassMap, facts: Sequence[PairFacts], split: str, *, learns: bool
) -> tuple[list[str], list[str]]:
    """Labels that never occur and labels that nobody listed: (errors, warnings).

    Args:
        split: its name in the messages.
        learns: the split is trained on, so nothing to learn is an error.
    """
    counts = label_counts(facts)
    errors: list[str] = []
    warnings: list[str] = []
    values = sorted(value for value in counts if value != classes.ignore_label)
    if not any(classes_present(item, classes) for item in facts):
        wanted = f"any of the labels {_some(classes.labels)}" if classes.labels else "a pixel of the object"
        message = f"{split}: no mask holds {wanted}; the masks hold {_some(values) or 'nothing that counts'}"
        (errors if learns or values not in ([], [0]) else warnings).append(message)
    elif absent := [label for label in classes.labels if not counts[label]]:
        warnings.append(f"{split}: the labels {absent} never occur in a mask")
    unlisted = [value for value in values if value not in (0, *classes.labels)] if classes.labels else []
    if not unlisted:
        return errors, warnings
    everything = sorted({*classes.labels, *unlisted})
    listed = f'to learn them: --class-list "{" ".join(map(str, everything))}"' if len(everything) <= 3 * SHOWN else ""
    note = f"{split}: the masks also hold the labels {_some(unlisted)}, first in {_first_with(facts, unlisted)}"
    if not classes.has_background:
        errors.append(f"{note}; {listed}, or --ignore-label for one: a list with 0 has no background to put them in")
    elif 0 < classes.max_mask_val < unlisted[-1]:
        errors.append(f"{note}: out of range, --max-mask-val is {classes.max_mask_val}")
    else:
        warnings.append(f"{note}. They are background; {listed or '--class-list nonzero learns them as one class'}")
    return errors, warnings


def _first_with(facts: Sequence[PairFacts], values: Sequence[int]) -> str:
    wanted = set(values)
    holds = (item.pair.mask for item in facts if item.mask and wanted & {value for value, _ in item.mask.labels})
    return str(next(holds))


def classes_present(item: PairFacts, classes: ClassMap) -> tuple[int, ...]:
    """Class indices that a forced crop of this image may be asked to hold: all but an implicit background."""
    if item.mask is None or not item.mask.labels:
        return ()
    found = set(classes.indices(np.array([value for value, _ in item.mask.labels], np.int64)).tolist())
    return tuple(sorted(found & set(range(int(classes.has_background), len(classes.names)))))


def class_pixels(facts: Sequence[PairFacts], classes: ClassMap) -> np.ndarray:
    """Training pixels of each class index, (K,) int64; ignored ones are left out."""
    totals = np.zeros(256, np.int64)
    counts = label_counts(facts)
    np.add.at(totals, classes.indices(np.array([*counts], np.int64)), np.array([*counts.values()], np.int64))
    return totals[: len(classes.names)]


def balanced_weights(pixels: np.ndarray) -> np.ndarray:
    """Weights of classes that make each class that occurs count the same, (K,) float32; absent ones get 0.

    Args:
        pixels: pixels of each class, (K,).
    """
    occurs = pixels > 0
    weights = np.zeros(len(pixels), np.float32)
    weights[occurs] = pixels.sum() / (occurs.sum() * pixels[occurs])
    return weights


# ----------------------------------------------------------------------------------------------------------------------
# Statistics


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
    order = _file_order(facts)
    own, other = run_dir / STATISTICS_FILE, root / STATISTICS_FILE
    for place in (other, own):
        if place.is_file():
            mean, std, found = read_statistics(place)
            if len(mean) == len(order) and found in (mark, None):
                source = f"{place}" + ("" if found else " (no digest in it, taken as given)")
                return Statistics(tuple(mean[order].tolist()), tuple(std[order].tolist()), extent, source)
    mean, std = statistics(facts)
    text = _statistics_text(mean[order], std[order], mark, steps)
    target = own if other.exists() else _write_first(text, other, own)
    if target == own:
        write_text(own, text)
    mean, std, _ = read_statistics(target)  # with the digits in the file, so that every later run has the same
    return Statistics(tuple(mean[order].tolist()), tuple(std[order].tolist()), extent, f"computed, kept in {target}")


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
    """Images that differ from what a network was trained on: another pixel type, intensities far off."""
    warnings = []
    kinds = {item.layers[0].dtype for item in facts if item.layers[0].dtype}
    if kinds - {config.dtype}:
        warnings.append(f"images are {' '.join(sorted(kinds))}, the network was trained on {config.dtype}")
    seen = [item for item in facts if item.has_data]
    channels = sum(layer.channels for layer in facts[0].layers) if facts else 0
    if not seen or channels != len(config.mean):
        return warnings
    mean, _ = statistics(seen)
    gap = np.abs(mean - np.array(config.mean)) / np.maximum(np.array(config.std), 1e-6)
    if gap.max() > 2:
        warnings.append(
            f"mean intensity {np.round(mean, 1).tolist()} is {gap.max():.1f} deviations from the training's "
            f"{np.round(config.mean, 1).tolist()}: expect worse results"
        )
    return warnings


# ----------------------------------------------------------------------------------------------------------------------
# The check that every training starts with


@dataclass
class Checked:
    """A data set that was looked at: its facts, its classes and what there is to say about it.

    errors stop a training, warnings and notes (choices that were made) do not.
    """

    root: Path
    val_name: str
    train: list[PairFacts]
    val: list[PairFacts]
    classes: ClassMap | None = None
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def raise_errors(self) -> ClassMap:
        """Stop on errors, all of them in one message; else return the classes.

        Raises:
            DatasetError: the check found errors.
        """
        if self.errors or self.classes is None:
            listed = [f"  - {message}" for message in self.errors[:SHOWN_ERRORS]]
            if len(self.errors) > SHOWN_ERRORS:
                listed.append("  - ... python -m dataset_utils.check lists them all")
            count = f"{len(self.errors)} error{'s' if len(self.errors) > 1 else ''}"
            raise DatasetError("\n".join([f"the data set has {count}:", *listed]))
        return self.classes


def check_from_flags(args: argparse.Namespace) -> Checked:
    """Find, scan and check the data set that the flags of cli.add_data_args describe.

    Raises:
        DatasetError: there are no files to look at.
    """
    files = FileOptions(tuple(args.add_dirs), args.roi_dir, args.ids, args.val_share, args.group_pattern)
    classes = ClassOptions(
        args.class_list, tuple(args.class_names or ()), args.ignore_label, args.mask_threshold, args.max_mask_val
    )
    train, val, note = find_splits(args.dataset, files, val_dir=args.val_dir, val_ids=args.val_ids)
    checked = check_dataset(train, val, classes, steps=args.preprocess, progress=True)
    checked.notes.insert(0, note)
    return checked


def check_dataset(
    train: Listing,
    val: Listing,
    options: ClassOptions,
    *,
    steps: Sequence[str] = (),
    workers: int | None = None,
    progress: bool = False,
) -> Checked:
    """Scan both splits and collect every finding at once."""
    facts = scan_pairs([*train.pairs, *val.pairs], steps=steps, workers=workers, progress=progress)
    root = train.folder.parent if train.folder.name == "train" else train.folder
    checked = Checked(root, val.name, facts[: len(train.pairs)], facts[len(train.pairs) :])
    checked.errors, checked.warnings = find_problems([train, val], facts)
    for part, split in ((train, "training"), (val, "validation")):
        if not part.has_masks:
            checked.errors.append(f"{part.folder} has no gt/ (or masks/): {split} needs a mask for every image")
        elif not part.pairs:
            checked.errors.append(f"no image of {part.folder} is left for {split}")
    twice = {pair.image.resolve() for pair in train.pairs} & {pair.image.resolve() for pair in val.pairs}
    if twice:
        checked.warnings.append(f"{len(twice)} images are in training and validation both, such as {min(twice)}")
    if any(item.mask and not item.mask.error for item in checked.train):
        _check_labels(checked, options)
    checked.errors = list(dict.fromkeys(checked.errors))
    checked.warnings = list(dict.fromkeys(checked.warnings))
    return checked


def _check_labels(checked: Checked, options: ClassOptions) -> None:
    """Choose the classes and compare them with the labels of both splits."""
    try:
        classes = checked.classes = resolve_classes(options, label_counts(checked.train))
    except DatasetError as error:
        checked.errors.append(str(error))
        return
    if options.labels and (options.max_mask_val or options.mask_threshold is not None):
        winner = "--max-mask-val" if options.mask_threshold is None else "--mask-threshold"
        checked.notes.append(f"{winner} is given, so --class-list {options.labels!r} is not used")
    elif not options.labels and classes.labels and not options.max_mask_val:
        label = classes.labels[0]
        checked.notes.append(f"no --class-list: the masks hold 0 and {label}, so {label} is the object")
    for split, part in (("training", checked.train), ("validation", checked.val)):
        readable = [item for item in part if item.mask and not item.mask.error]
        if readable:
            errors, warnings = find_label_problems(classes, readable, split, learns=split == "training")
            checked.errors += errors
            checked.warnings += warnings
