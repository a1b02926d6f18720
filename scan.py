"""Look at every file of a data set once, in parallel and cached: what is wrong with it, its labels, its statistics."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from checkpoint import ModelConfig
from dataset import ClassMap, DatasetError, Listing, Pair
from image_io import ImageError, preprocess, read_image, read_mask, read_orientation, read_valid, write_text

CACHE_VERSION = 1
MANY_LABELS = 4096  # a mask with more different values is kept as "zero or not"
STATISTICS_FILE = "mean_vals.txt"


@dataclass
class ImageFacts:
    """What one image file holds. Sums run over its valid pixels, in raw units, a number per channel."""

    size: tuple[int, int] = (0, 0)
    channels: int = 0
    dtype: str = ""
    orientation: int = 1
    pixels: int = 0
    sums: list[float] = field(default_factory=list)
    squares: list[float] = field(default_factory=list)
    low: float = 0.0
    high: float = 0.0
    nonfinite: int = 0
    error: str | None = None


@dataclass
class MaskFacts:
    """What one mask file holds: pixels of each value, [[value, count], ...]."""

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
    pairs: Sequence[Pair],
    *,
    steps: Sequence[str] = (),
    workers: int | None = None,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] | None = None,
) -> list[PairFacts]:
    """Read every file of the pairs that the cache does not know at its present size and time.

    Args:
        steps: preprocessing that the statistics belong to.
        progress: wraps the iterable of finished files, given with their number, to show how far it is.
    """
    cache_path = _cache_path(pairs)
    cache = _read_cache(cache_path)
    jobs: dict[str, tuple[Callable[..., Any], Path, bool]] = {}
    for pair in pairs:
        for place, path in enumerate([pair.image, *pair.extras]):
            jobs[_key(path, "image", steps)] = (lambda p, first: _image_facts(p, steps, first), path, place > 0)
        for path in (pair.mask, pair.roi):
            if path:
                jobs[_key(path, "mask", ())] = (lambda p, _: _mask_facts(p), path, False)
    fresh = [key for key in jobs if key not in cache]
    if fresh:
        with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
            done: Iterable[Any] = pool.map(lambda key: jobs[key][0](*jobs[key][1:]), fresh)
            done = progress(done, len(fresh)) if progress else done
            cache.update(zip(fresh, (vars(facts) for facts in done), strict=True))
        _write_cache(cache_path, {key: cache[key] for key in cache if key in jobs})
    return [_pair_facts(pair, cache, steps) for pair in pairs]


def _pair_facts(pair: Pair, cache: dict[str, Any], steps: Sequence[str]) -> PairFacts:
    layers = [ImageFacts(**cache[_key(path, "image", steps)]) for path in (pair.image, *pair.extras)]
    mask = MaskFacts(**cache[_key(pair.mask, "mask", ())]) if pair.mask else None
    roi = MaskFacts(**cache[_key(pair.roi, "mask", ())]) if pair.roi else None
    return PairFacts(pair, layers, mask, roi)


def _image_facts(path: Path, steps: Sequence[str], first_channel: bool) -> ImageFacts:
    try:
        image, valid, orientation = read_image(path), read_valid(path), read_orientation(path)
    except (ImageError, OSError) as error:
        return ImageFacts(error=str(error))
    if first_channel:
        image = image[:, :, :1]
    facts = ImageFacts(image.shape[:2], image.shape[2], str(image.dtype), orientation)
    pixels = image.reshape(-1, image.shape[2]) if valid is None else image[valid]
    if image.dtype.kind == "f":
        facts.nonfinite = int(pixels.size - np.isfinite(pixels).sum())
    if facts.nonfinite or not len(pixels):
        return facts
    facts.low, facts.high = float(pixels.min()), float(pixels.max())
    if steps:
        image = preprocess(image if valid is None else np.where(valid[:, :, None], image, 0), steps)
        pixels = image.reshape(-1, image.shape[2]) if valid is None else image[valid]
    facts.pixels = len(pixels)
    facts.sums, facts.squares = _sums(pixels)
    return facts


def _sums(pixels: np.ndarray) -> tuple[list[float], list[float]]:
    """Sum and sum of squares for each channel of (P, C), exact for whole numbers."""
    if pixels.dtype == np.uint8:
        counts = np.stack([np.bincount(pixels[:, c], minlength=256) for c in range(pixels.shape[1])])
        values = np.arange(256, dtype=np.float64)
        return (counts @ values).tolist(), (counts @ values**2).tolist()
    sums = pixels.sum(axis=0, dtype=np.float64)
    squares = [float(np.square(pixels[:, c], dtype=np.float64).sum()) for c in range(pixels.shape[1])]
    return sums.tolist(), squares


def _mask_facts(path: Path) -> MaskFacts:
    try:
        mask, orientation = read_mask(path), read_orientation(path)
    except (ImageError, OSError) as error:
        return MaskFacts(error=str(error))
    if mask.dtype.itemsize <= 2:
        counts = np.bincount(mask.ravel())
        values = np.flatnonzero(counts)
        counts = counts[values]
    else:
        values, counts = np.unique(mask, return_counts=True)
    if len(values) > MANY_LABELS:
        zero = int(counts[values == 0].sum())
        values, counts = np.array([0, 1]), np.array([zero, mask.size - zero])
    labels = [[int(value), int(count)] for value, count in zip(values, counts, strict=True) if count]
    return MaskFacts(mask.shape, orientation, labels)


def cache_dir() -> Path:
    """Folder of what can be computed again: $XDG_CACHE_HOME/tessera or ~/.cache/tessera."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tessera"


def _cache_path(pairs: Sequence[Pair]) -> Path:
    folder = str(pairs[0].image.parent.resolve()) if pairs else ""
    return cache_dir() / f"scan-{hashlib.sha256(folder.encode()).hexdigest()[:16]}.json"


def _key(path: Path, kind: str, steps: Sequence[str]) -> str:
    state = path.stat()
    return f"{kind}|{'+'.join(steps)}|{path.resolve()}|{state.st_size}|{state.st_mtime_ns}"


def _read_cache(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # no cache yet, or one cut short by a full disk: everything is read again
    return content["facts"] if content.get("version") == CACHE_VERSION else {}


def _write_cache(path: Path, facts: dict[str, Any]) -> None:
    try:
        write_text(path, json.dumps({"version": CACHE_VERSION, "facts": facts}))
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
        layer = item.layers[0]
        if layer.error is None and not layer.nonfinite and layer.low == layer.high:
            warnings.append(f"{item.pair.image} is constant: every pixel is {layer.low:g}")
    errors += _mixed([(item.pair.image, f"{item.channels} channels") for item in facts if item.channels], "channels")
    warnings += _mixed([(item.pair.image, item.layers[0].dtype) for item in facts if item.channels], "pixel types")
    return errors, warnings


def _pair_errors(item: PairFacts) -> list[str]:
    pair, image = item.pair, item.layers[0]
    others = list(zip(pair.extras, item.layers[1:], strict=True))
    others += [(path, part) for path, part in ((pair.mask, item.mask), (pair.roi, item.roi)) if path and part]
    errors = [part.error for _, part in [(pair.image, image), *others] if part.error]
    for path, part in [(pair.image, image), *others]:
        if isinstance(part, ImageFacts) and part.nonfinite:
            errors.append(
                f"{path} has {part.nonfinite} values that are NaN or infinite; expected finite values, "
                "or a nodata value declared in the file (GDAL tag)"
            )
    for path, part in others:
        if image.error or part.error:
            continue
        if part.orientation != image.orientation and 1 in (part.orientation, image.orientation):
            errors.append(
                f"{pair.image} has EXIF orientation {image.orientation}, {path} has {part.orientation}: which way up "
                "they belong together is unknown. Save both with the same orientation, or both without."
            )
        elif tuple(part.size) != tuple(image.size):
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


def label_counts(facts: Sequence[PairFacts]) -> Counter[int]:
    """Pixels of each mask value over all masks."""
    counts: Counter[int] = Counter()
    for item in facts:
        for value, count in item.mask.labels if item.mask else []:
            counts[value] += count
    return counts


def resolve_classes(
    class_list: str | None,
    counts: Counter[int],
    *,
    names: Sequence[str] | None = None,
    ignore_label: int | None = None,
    mask_threshold: float | None = None,
    max_mask_val: int = 0,
) -> ClassMap:
    """Turn the flags about classes into a ClassMap; without a list, masks of {0, x} mean x.

    Args:
        class_list: mask labels such as "64 128", or "nonzero", or None.
        counts: pixels of each value in the training masks.

    Raises:
        DatasetError: labels that cannot be, a list that is needed, or names that do not fit.
    """
    labels = _labels(class_list, counts, ignore_label, mask_threshold, max_mask_val)
    classes = [str(label) for label in labels] or ["object"]
    if 0 not in labels:
        classes = ["background", *classes]
    if len(classes) < 2:
        raise DatasetError("--class-list 0 alone leaves nothing to tell it from; add the labels of the other classes")
    if names:
        given = ["background", *names] if 0 not in labels and len(names) == len(classes) - 1 else list(names)
        if len(given) != len(classes):
            raise DatasetError(f"--class-names has {len(names)} names, expected {len(classes) - (0 not in labels)}")
        classes = given
    return ClassMap(labels, tuple(classes), ignore_label, mask_threshold, max_mask_val)


def _labels(
    class_list: str | None,
    counts: Counter[int],
    ignore_label: int | None,
    mask_threshold: float | None,
    max_mask_val: int,
) -> tuple[int, ...]:
    if mask_threshold is not None or class_list == "nonzero":
        return ()
    if max_mask_val:
        return tuple(range(1, max_mask_val + 1))
    if class_list:
        return _listed(class_list, ignore_label)
    values = sorted(value for value in counts if value not in (0, ignore_label))
    if len(values) == 1 and values[0] > 0:
        return (values[0],)
    if not values:
        raise DatasetError("every mask is empty (only label 0): there is nothing to learn; check the masks in gt/")
    shown = " ".join(map(str, values[:20])) + (" ..." if len(values) > 20 else "")
    raise DatasetError(
        f"the masks hold the labels 0 {shown}, which needs a choice: "
        f'--class-list "{shown}" (or a part of it) for classes, --max-mask-val {values[-1]} for all up to it, '
        "--class-list nonzero for instance maps, or --mask-threshold 127 for grey or JPEG masks"
    )


def _listed(class_list: str, ignore_label: int | None) -> tuple[int, ...]:
    try:
        labels = tuple(int(word) for word in class_list.replace(",", " ").split())
    except ValueError:
        raise DatasetError(f'--class-list {class_list!r} must be labels such as "64 128", or nonzero') from None
    wrong = [label for label in labels if not 0 <= label <= 65535]
    if wrong or not labels:
        raise DatasetError(f"--class-list {class_list!r}: label {wrong or 'missing'} out of range, expected 0 to 65535")
    if len(set(labels)) != len(labels) or ignore_label in labels:
        raise DatasetError(f"--class-list {class_list!r} names a label twice, or the one of --ignore-label")
    if len(labels) > 250:
        raise DatasetError(f"--class-list names {len(labels)} labels, at most 250 are possible")
    return labels


def find_label_problems(classes: ClassMap, counts: Counter[int], split: str) -> tuple[list[str], list[str]]:
    """Labels that never occur and labels that nobody listed: (errors, warnings)."""
    if classes.mask_threshold is not None:
        return [], []
    errors, warnings = [], []
    known = {*classes.labels, classes.ignore_label}
    absent = [label for label in classes.labels if not counts[label]]
    if classes.labels and len(absent) == len(classes.labels):
        present = " ".join(str(value) for value in sorted(counts)[:20])
        errors.append(f"{split}: no mask holds any of the labels {absent}; the masks hold {present}")
    elif absent:
        warnings.append(f"{split}: the labels {absent} never occur in a mask")
    unlisted = sorted(value for value in counts if value not in known and value != 0) if classes.labels else []
    if not classes.has_background:
        unlisted = sorted(value for value in counts if value not in known)
    if not classes.labels and not sum(count for value, count in counts.items() if value not in (0, *known)):
        errors.append(f"{split}: every mask is empty (only label 0), there is nothing to learn")
    if unlisted:
        everything = " ".join(map(str, sorted({*classes.labels, *unlisted})[:60]))
        note = f'{split}: the masks also hold the labels {unlisted[:20]}; to learn them: --class-list "{everything}"'
        if not classes.has_background:
            errors.append(f"{note}, or --ignore-label for one of them: a list with 0 has no background to put them in")
        elif classes.max_mask_val and unlisted[-1] > classes.max_mask_val:
            errors.append(f"{note}: out of range of --max-mask-val {classes.max_mask_val}")
        else:
            warnings.append(f"{note}. Now they are background.")
    return errors, warnings


def classes_present(item: PairFacts, classes: ClassMap) -> tuple[int, ...]:
    """Class indices that a forced crop of this image may be asked to hold: all but an implicit background."""
    if item.mask is None:
        return ()
    values = np.array([value for value, _ in item.mask.labels], np.int64)
    if classes.mask_threshold is not None:
        return (1,) if (values > classes.mask_threshold).any() else ()
    found = set(np.unique(classes.table[np.minimum(values, 65535)]).tolist())
    return tuple(sorted(found & set(range(int(classes.has_background), len(classes.names)))))


def class_pixels(facts: Sequence[PairFacts], classes: ClassMap) -> np.ndarray:
    """Training pixels of each class index, (K,) int64; ignored ones are left out."""
    totals = np.zeros(256, np.int64)
    for value, count in label_counts(facts).items():
        index = (
            value > classes.mask_threshold if classes.mask_threshold is not None else classes.table[min(value, 65535)]
        )
        totals[int(index)] += count
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
    """Mean and standard deviation per channel over all valid pixels of the split, float64, in network order."""
    sums = np.array([[value for layer in item.layers for value in layer.sums] for item in facts if _counted(item)])
    squares = np.array([[v for layer in item.layers for v in layer.squares] for item in facts if _counted(item)])
    pixels = np.array([[layer.pixels for layer in item.layers for _ in layer.sums] for item in facts if _counted(item)])
    if not len(sums):
        raise DatasetError("no training image has a valid pixel, so there are no statistics")
    mean = sums.sum(axis=0) / pixels.sum(axis=0)
    variance = squares.sum(axis=0) / pixels.sum(axis=0) - mean**2
    return mean, np.sqrt(np.maximum(variance, 0))


def _counted(item: PairFacts) -> bool:
    return all(layer.pixels for layer in item.layers)


def value_range(facts: Sequence[PairFacts]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Lowest and highest value of each channel: 0 and 255 for 8 bit, else from 0 (or less) to what the files hold."""
    low: list[float] = []
    high: list[float] = []
    for place, first in enumerate(facts[0].layers):
        layers = [item.layers[place] for item in facts if item.layers[place].pixels]
        eight_bit = all(layer.dtype == "uint8" for layer in layers)
        low += [0.0 if eight_bit else min(0.0, *(layer.low for layer in layers))] * first.channels
        high += [255.0 if eight_bit else max(layer.high for layer in layers)] * first.channels
    return tuple(low), tuple(high)


def digest(facts: Sequence[PairFacts], steps: Sequence[str], extra: str = "") -> str:
    """Short name of what statistics were computed from: file names, sizes, preprocessing, part of the data."""
    words = [f"{path.name}:{path.stat().st_size}" for item in facts for path in (item.pair.image, *item.pair.extras)]
    return hashlib.sha256("|".join([*sorted(words), *steps, extra]).encode()).hexdigest()[:16]


def load_or_compute_statistics(
    root: Path, run_dir: Path, facts: Sequence[PairFacts], steps: Sequence[str]
) -> Statistics:
    """Statistics of the training split, from <root>/mean_vals.txt if it belongs to these files, else computed.

    The file holds two lines of numbers, mean and std, in the order B G R extras when the images are RGB, then a
    comment with the digest. One without a digest was given by the user and is taken as it is. A file that belongs to
    other data is left alone: the statistics then go into the run folder, as they do when `root` cannot be written.
    """
    mark, extent = digest(facts, steps), value_range(facts)
    order = _file_order(facts)
    path = root / STATISTICS_FILE
    for place in (path, run_dir / STATISTICS_FILE):
        if place.is_file():
            mean, std, found = read_statistics(place)
            if len(mean) == len(order) and found in (mark, None):
                source = f"{place}" + ("" if found else " (no digest in it, taken as given)")
                return Statistics(tuple(mean[order].tolist()), tuple(std[order].tolist()), extent, source)
    mean, std = statistics(facts)
    text = _statistics_text(mean[order], std[order], mark, steps)
    target = run_dir / STATISTICS_FILE if path.exists() or not os.access(root, os.W_OK) else path
    write_text(target, text)
    mean, std, _ = read_statistics(target)
    return Statistics(tuple(mean[order].tolist()), tuple(std[order].tolist()), extent, f"computed, kept in {target}")


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
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    marks = [line.split()[2].rstrip(";") for line in lines if line.startswith("# digest ")]
    try:
        rows = [np.array([float(word) for word in line.split()]) for line in lines if not line.startswith("#")]
    except ValueError as error:
        raise DatasetError(
            f"{path} is not a list of means and deviations: {error}; delete it to compute it anew"
        ) from error
    if len(rows) != 2 or len(rows[0]) != len(rows[1]):
        raise DatasetError(
            f"{path} has {len(rows)} lines of numbers, expected 2 of one length; delete it to compute it"
        )
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
    mean, _ = statistics(facts)
    gap = np.abs(mean - np.array(config.mean)) / np.maximum(np.array(config.std), 1e-6)
    if len(mean) == len(config.mean) and gap.max() > 2:
        warnings.append(
            f"mean intensity {np.round(mean, 1).tolist()} is {gap.max():.1f} deviations from the training's "
            f"{np.round(config.mean, 1).tolist()}: expect worse results"
        )
    return warnings


# ----------------------------------------------------------------------------------------------------------------------
# The check that every training starts with


@dataclass
class Checked:
    """A data set that was looked at: its facts, its classes and what there is to say about it."""

    train: list[PairFacts]
    val: list[PairFacts]
    classes: ClassMap | None
    errors: list[str]
    warnings: list[str]

    def raise_errors(self) -> ClassMap:
        """Stop on errors, all of them in one message; else return the classes.

        Raises:
            DatasetError: the check found errors.
        """
        if self.errors or self.classes is None:
            listed = "\n".join(f"  - {message}" for message in self.errors)
            raise DatasetError(f"the data set has {len(self.errors)} errors:\n{listed}")
        return self.classes


def check_dataset(
    train: Listing,
    val: Listing | None,
    choose_classes: Callable[[Counter[int]], ClassMap],
    *,
    steps: Sequence[str] = (),
    workers: int | None = None,
    progress: Callable[[Iterable[Any], int], Iterable[Any]] | None = None,
) -> Checked:
    """Scan both splits and collect every finding at once.

    Args:
        choose_classes: makes the classes from the label counts of the training masks, see resolve_classes.
    """
    listings = [train, val] if val else [train]
    facts = scan_pairs([p for part in listings for p in part.pairs], steps=steps, workers=workers, progress=progress)
    own, other = facts[: len(train.pairs)], facts[len(train.pairs) :]
    errors, warnings = find_problems(listings, facts)
    for part, split in zip(listings, ("training", "validation"), strict=False):
        if not part.has_masks:
            errors.append(f"{part.folder} has no gt/ (or masks/): {split} needs a mask for every image")
        elif not part.pairs:
            errors.append(f"no image of {part.folder} is left for {split}")
    classes = None
    if own and train.has_masks and not any(item.mask and item.mask.error for item in own):
        try:
            classes = choose_classes(label_counts(own))
        except DatasetError as error:
            errors.append(str(error))
    if classes:
        for split, part_facts in (("training", own), ("validation", other)):
            if part_facts:
                found = find_label_problems(classes, label_counts(part_facts), split)
                errors, warnings = errors + found[0], warnings + found[1]
    return Checked(own, other, classes, list(dict.fromkeys(errors)), list(dict.fromkeys(warnings)))
