"""Look at every file of a data set once, in parallel and cached: what is wrong with it, its labels, its statistics."""

import argparse
import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from classes import SHOWN, AnnotationLabels, ClassMap, ClassOptions, list_labels, resolve_classes
from dataset import both_hold, read_layer
from facts import ImageFacts, MaskFacts, PairFacts, count_labels, moments
from image_io import ImageError, cache_dir, read_mask, read_orientation, write_text
from pairing import (
    DatasetError,
    FileOptions,
    Listing,
    Pair,
    find_further,
    find_splits,
    find_training,
    group_name,
    unique_names,
)
from slide_masks import is_annotation
from slide_scan import choose_tissue, scan_slide
from slide_windows import AS_STORED, SlideOptions, is_slide

CACHE_VERSION = 2
SHOWN_ERRORS = 100  # that stop a training; the command that only checks lists more


# ----------------------------------------------------------------------------------------------------------------------
# Reading


def scan_pairs(
    pairs: Sequence[Pair],
    *,
    steps: Sequence[str] = (),
    slides: SlideOptions = AS_STORED,
    workers: int | None = None,
    progress: bool = False,
) -> list[PairFacts]:
    """Read every pair that the cache does not know with its files' present sizes and times.

    An interrupted scan keeps what it has read. A pair with an unreadable file is not kept: it is read again each time,
    for what kept it from being read, such as its permissions, leaves size and time as they are.

    Args:
        steps: preprocessing that the statistics belong to.
        slides: how slides are read. Of a slide the statistics are from windows, the labels from the whole mask, both
            at the training scale.
        workers: threads; None is one for each core.
        progress: show a bar on a terminal.
    """
    cache_path = _cache_path(pairs)
    cache = _read_cache(cache_path)
    by_windows = [is_slide(pair, slides) for pair in pairs]
    keys = [_key(pair, steps, slides if large else None) for pair, large in zip(pairs, by_windows, strict=True)]
    states = [[_state(path) for path in _files(pair)] for pair in pairs]
    fresh = [i for i, key in enumerate(keys) if cache.get(key, {}).get("state") != states[i]]
    if fresh:
        pool = ThreadPoolExecutor(workers or os.cpu_count())
        try:
            found = pool.map(
                lambda i: scan_slide(pairs[i], slides, steps) if by_windows[i] else _scan_pair(pairs[i], steps), fresh
            )
            bar = tqdm(found, "checking files", len(fresh), leave=False, disable=None if progress else True, unit="img")
            for i, facts in zip(fresh, bar, strict=True):
                cache[keys[i]] = {"state": states[i], **facts}
        finally:
            pool.shutdown(cancel_futures=True)
            _write_cache(cache_path, {key: entry for key, entry in cache.items() if not _has_error(entry)})
    return [_from_cache(pair, cache[key]) for pair, key in zip(pairs, keys, strict=True)]


def _has_error(entry: dict[str, Any]) -> bool:
    return any(part and part["error"] for part in (*entry["layers"], entry["mask"], entry["roi"]))


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


def _scan_mask(path: Path) -> tuple[MaskFacts, np.ndarray | None]:
    try:
        mask = read_mask(path)
        return MaskFacts(mask.shape[:2], read_orientation(path)), mask
    except (ImageError, OSError) as error:
        return MaskFacts(error=str(error)), None


def _cache_path(pairs: Sequence[Pair]) -> Path:
    folder = str(pairs[0].image.parent.resolve()) if pairs else ""
    return cache_dir() / f"scan-{hashlib.sha256(folder.encode()).hexdigest()[:16]}.json"


def _files(pair: Pair) -> list[Path]:
    return [*pair.layers, *(path for path in (pair.mask, pair.roi) if path)]


def _key(pair: Pair, steps: Sequence[str], slides: SlideOptions | None = None) -> str:
    layers = "|".join(str(path.resolve()) for path in pair.layers)
    mask, roi = (path.resolve() if path else "" for path in (pair.mask, pair.roi))
    way = f"|{pair.name} by windows, {slides.text()}" if slides else ""
    return f"{'+'.join(steps)}|{layers}|mask {mask}|roi {roi}{way}"


def _state(path: Path) -> list[int]:
    state = path.stat()
    return [state.st_size, state.st_mtime_ns]


def _from_cache(pair: Pair, entry: dict[str, Any]) -> PairFacts:
    def image(values: dict[str, Any]) -> ImageFacts:
        return ImageFacts(**{**values, "size": tuple(values["size"])})

    def mask(values: dict[str, Any] | None) -> MaskFacts | None:
        return values and MaskFacts(**{**values, "size": tuple(values["size"])})  # type: ignore[return-value]

    layers = [image(layer) for layer in entry["layers"]]
    return PairFacts(pair, layers, mask(entry["mask"]), mask(entry["roi"]), entry.get("sampled", ""))


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
        warnings += [message for part in (item.mask, item.roi) if part for message in part.findings]
        for path, layer in zip(item.pair.layers, item.layers, strict=True):
            if layer.error is None and not layer.pixels:
                warnings.append(f"{path} has no pixel with data")
            elif layer.error is None and layer.low == layer.high:
                warnings.append(f"{path} is constant: every pixel is {layer.low:g}")
    channels = [(item.pair.image, f"{item.channels} channels") for item in facts if item.channels]
    errors += _mixed(channels, "channels", "One data set needs the same number everywhere.")
    for place in range(len(facts[0].layers) if facts else 0):
        layers = [(item.pair.layers[place], item.layers[place].dtype) for item in facts]
        types = [(path, dtype) for path, dtype in layers if dtype]
        warnings += _mixed(types, "pixel types", "They share one mean and deviation: convert them to one scale first.")
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


def _mixed(found: Sequence[tuple[Path, str]], what: str, effect: str) -> list[str]:
    kinds: dict[str, list[Path]] = {}
    for path, kind in found:
        kinds.setdefault(kind, []).append(path)
    if len(kinds) < 2:
        return []
    listed = "; ".join(f"{kind}: {len(paths)} images, such as {paths[0]}" for kind, paths in kinds.items())
    return [f"images differ in {what}: {listed}. {effect}"]


# ----------------------------------------------------------------------------------------------------------------------
# Classes


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
        wanted = f"any of the labels {list_labels(classes.labels)}" if classes.labels else "a pixel of the object"
        message = f"{split}: no mask holds {wanted}; the masks hold {list_labels(values) or 'nothing that counts'}"
        (errors if learns or values not in ([], [0]) else warnings).append(message)
    elif absent := [label for label in classes.labels if not counts[label]]:
        warnings.append(f"{split}: the labels {absent} never occur in a mask")
    unlisted = [value for value in values if value not in (0, *classes.labels)] if classes.labels else []
    if not unlisted:
        return errors, warnings
    everything = sorted({*classes.labels, *unlisted})
    listed = f'to learn them: --class-list "{" ".join(map(str, everything))}"' if len(everything) <= 3 * SHOWN else ""
    note = f"{split}: the masks also hold the labels {list_labels(unlisted)}, first in {_first_with(facts, unlisted)}"
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
# The check that every training starts with


@dataclass
class Checked:
    """A data set that was looked at: its facts, its classes and what there is to say about it.

    val: of the main validation set, empty when there is none. further: of other validation sets, by unique names.
    errors stop a training, warnings and notes (choices that were made) do not. slides: how slides are read.
    """

    root: Path
    val_name: str
    train: list[PairFacts]
    val: list[PairFacts]
    classes: ClassMap | None = None
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    slides: SlideOptions = AS_STORED
    further: dict[str, list[PairFacts]] = field(default_factory=dict)

    @property
    def val_sets(self) -> dict[str, list[PairFacts]]:
        """Every validation set by its name, the main one first."""
        return {**({self.val_name: self.val} if self.val else {}), **self.further}

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


def check_from_flags(
    args: argparse.Namespace, further: Sequence[Path] = (), *, main_val: bool = True, folds: bool = False
) -> Checked:
    """Find, scan and check the data set that the flags of cli.add_data_args describe.

    Args:
        further: more validation sets, see find_further.
        main_val: whether the data set has a validation set of its own; without one nothing is held out.
        folds: what is held out is chosen later, by the caller.

    Raises:
        DatasetError: there are no files to look at.
    """
    slides = SlideOptions(args.mpp or 0.0, args.reduce or 1.0)
    files = FileOptions(tuple(args.add_dirs), args.roi_dir, args.ids, args.val_share, args.group_pattern)
    classes = ClassOptions(
        args.class_list, tuple(args.class_names or ()), args.ignore_label, args.mask_threshold, args.max_mask_val
    )
    more = find_further(further, files)
    if main_val and not folds:
        train, val, note = find_splits(args.dataset, files, val_dir=args.val_dir, val_ids=args.val_ids)
    else:
        train, val, note = find_training(args.dataset, files), None, "no main validation set"
    slides, said = choose_tissue(train.pairs, slides, args.tissue)
    checked = check_dataset(train, val, classes, further=more, steps=args.preprocess, slides=slides, progress=True)
    listed = "; ".join(
        f"{name}: {len(part)} images of {folder.folder}"
        for (name, part), folder in zip(checked.further.items(), more, strict=True)
    )
    if folds:
        note = f"{args.dataset / 'val'} takes no part" if (args.dataset / "val").is_dir() else ""
    notes = [note, said, listed and f"further validation sets {listed}"]
    checked.notes[:0] = [text for text in notes if text]
    checked.warnings += _groups_on_both_sides(checked, args.group_pattern)
    return checked


def _groups_on_both_sides(checked: Checked, pattern: str | None) -> list[str]:
    """A warning when groups are learned and scored both: --group-pattern moves nothing where the split is given."""
    if not pattern:
        return []
    scored = [item for part in checked.val_sets.values() for item in part]
    try:
        learned, known = ({group_name(item.pair.name, pattern) for item in part} for part in (checked.train, scored))
    except DatasetError as error:
        return [f"{error}; groups of training and validation were not compared"]
    both = learned & known
    if not both:
        return []
    count = f"{len(both)} group{'s' if len(both) > 1 else ''}"
    return [f"{count} of --group-pattern {pattern!r} in training and validation both, such as {min(both)!r}"]


def check_dataset(
    train: Listing,
    val: Listing | None,
    options: ClassOptions,
    *,
    further: Sequence[Listing] = (),
    steps: Sequence[str] = (),
    slides: SlideOptions = AS_STORED,
    workers: int | None = None,
    progress: bool = False,
) -> Checked:
    """Scan every split and collect every finding at once.

    Args:
        val: None: there is no main validation set.
        further: other validation sets; where names are the same they get numbers.
    """
    listings = [train, *([val] if val else []), *further]
    facts = scan_pairs(
        [pair for listing in listings for pair in listing.pairs],
        steps=steps,
        slides=slides,
        workers=workers,
        progress=progress,
    )
    rest = iter(facts)
    parts = [[next(rest) for _ in listing.pairs] for listing in listings]
    names = unique_names([(val or train).name, *(listing.name for listing in further)])
    root = train.folder.parent if train.folder.name == "train" else train.folder
    checked = Checked(root, names[0], parts[0], parts[1] if val else [], slides=slides)
    checked.further = dict(zip(names[1:], parts[2 if val else 1 :], strict=True))
    checked.errors, checked.warnings = find_problems(listings, facts)
    for part, split in zip(listings, ["training", *["validation"] * (len(listings) - 1)], strict=True):
        if not part.has_masks:
            checked.errors.append(f"{part.folder} has no gt/ (or masks/): {split} needs a mask for every image")
        elif not part.pairs:
            checked.errors.append(f"no image of {part.folder} is left for {split}")
    scored = {item.pair.image.resolve() for scored in checked.val_sets.values() for item in scored}
    twice = {pair.image.resolve() for pair in train.pairs} & scored
    if twice:
        checked.warnings.append(f"{len(twice)} images are in training and validation both, such as {min(twice)}")
    unnamed = _name_annotations(checked, options)
    checked.errors += unnamed
    if not unnamed and any(item.mask and not item.mask.error for item in checked.train):
        _check_labels(checked, options)
    checked.errors = list(dict.fromkeys(checked.errors))
    checked.warnings = list(dict.fromkeys(checked.warnings))
    return checked


def name_labels(facts: Sequence[PairFacts], labels: AnnotationLabels) -> list[str]:
    """Give annotations the mask values of the classes they name, in place; errors for names that no class has."""
    errors = []
    for item in facts:
        if item.mask is None or item.mask.names is None or item.mask.error or item.pair.mask is None:
            continue
        try:
            table = labels.values(item.mask.names, item.pair.mask)
        except DatasetError as error:
            errors.append(str(error))
            continue
        counts: Counter[int] = Counter()
        for value, count in item.mask.labels:
            counts[table[item.mask.names[value - 1]] if value else 0] += count
        item.mask.labels = [[value, count] for value, count in sorted(counts.items())]
        item.mask.names = None
    return errors


def _name_annotations(checked: Checked, options: ClassOptions) -> list[str]:
    """Find the mask values of what annotations name, see name_labels; say when several names become one class."""
    facts = [*checked.train, *(item for part in checked.val_sets.values() for item in part)]
    found = {name for item in facts if item.mask for name in item.mask.names or []}
    if not found:
        return []
    labels, named = AnnotationLabels.from_options(options), sorted(name for name in found if name is not None)
    if not labels.names and len(named) > 1:
        shown = " ".join(named[:SHOWN])
        checked.notes.append(
            f"annotations of {len(named)} classes are one object; to tell them apart: --class-names {shown}"
        )
    return name_labels(facts, labels)


def _annotation_options(checked: Checked, options: ClassOptions) -> ClassOptions:
    """Labels 1, 2, ... for the names of --class-names where only annotations, which name their classes, say more."""
    drawn = any(is_annotation(item.pair.mask) for item in checked.train)
    if not drawn or options.labels or options.max_mask_val or options.mask_threshold is not None or not options.names:
        return options
    labels = AnnotationLabels.from_options(options).labels
    return replace(options, labels=" ".join(map(str, labels)))


def _check_labels(checked: Checked, options: ClassOptions) -> None:
    """Choose the classes and compare them with the labels of both splits."""
    options = _annotation_options(checked, options)
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
    scored = [
        (f"validation {name}" if name in checked.further else "validation", part)
        for name, part in checked.val_sets.items()
    ]
    for split, part in (("training", checked.train), *scored):
        readable = [item for item in part if item.mask and not item.mask.error]
        if readable:
            errors, warnings = find_label_problems(classes, readable, split, learns=split == "training")
            checked.errors += errors
            checked.warnings += warnings
