"""A probe of a frozen encoder: how well a small head on its features segments a labelled data set.

The windows are chosen once and are the same in every epoch and run, so that scores of one run can be compared.

Example:
    probe = Probe(ProbeOptions(Path("data/roads"), channels, mean, std, side=128))
    probe.score(encoder)  # {"IoU": 0.61, "Dice": 0.76}
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from augmentations import Augmentation
from checkpoint import Geometry, ModelConfig
from classes import ClassMap, ClassOptions
from dataset import Slot, TrainingSet
from facts import PairFacts
from metrics import Scorer
from pairing import DatasetError, FileOptions, find_splits
from scan import Checked, check_dataset, classes_present
from selfsupervised.encoders import feature_maps
from selfsupervised.probe_heads import DecoderHead, Head, LinearHead
from slide_index import prepare_slides
from slide_scan import choose_tissue
from slide_windows import AS_STORED, SlideOptions, is_slide

HEADS: Mapping[str, type[Head]] = {"linear": LinearHead, "decoder": DecoderHead}
WINDOWS, WINDOW_BYTES = 96, 64 << 20  # of each part: so many at most, and the memory that they may take
BATCH = 8  # windows that the encoder sees at a time
SHOWN = 5  # warnings that are passed on


@dataclass(frozen=True)
class ProbeOptions:
    """What is probed, and on what.

    root: a data set with train/ and val/; of one without val/ a part is held out by name, as train.py does.
    channels, mean, std (in raw units), preprocess, dtype: of the images that the encoder learns from. side: of the
    square windows. classes: what mask labels mean. head: a name of HEADS. slides: how slides are read. tissue: a rule,
    or auto. add_dirs: folders of the last channels, beside images/ here too.
    """

    root: Path
    channels: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    side: int
    classes: ClassOptions = ClassOptions()
    head: str = "linear"
    preprocess: tuple[str, ...] = ()
    dtype: str = "uint8"
    slides: SlideOptions = AS_STORED
    tissue: str = "none"
    seed: int = 0
    add_dirs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Windows:
    """Windows of one part: images (n, C, S, S) float32, normalised, masks (n, S, S) uint8, 255 ignored, and names."""

    images: Tensor
    masks: Tensor
    names: tuple[str, ...]


class Probe:
    """A labelled data set, ready to score encoders.

    notes: what was found; warnings: what may be wrong with it. held_out: files of the images that are validated on.

    Raises:
        DatasetError: no such data set, no labels, nothing to validate on, or other channels than the encoder sees.
    """

    def __init__(self, options: ProbeOptions) -> None:
        self.options = options
        checked, self.classes, config = _check(options)
        self.train = _draw(checked.train, self.classes, config, options, forced=True)
        self.val = _draw(checked.val, self.classes, config, options, forced=False)
        self.warnings, self.held_out = checked.warnings[:SHOWN], [item.pair.image for item in checked.val]
        kinds = {item.layers[0].dtype for item in checked.train}
        if kinds != {options.dtype}:
            self.warnings.append(f"its images are {' '.join(sorted(kinds))}, those of the encoder {options.dtype}")
        sizes = [f"{len(part.names)} windows of {len(set(part.names))}" for part in (self.train, self.val)]
        named = ", ".join(self.classes.names)
        self.notes = [f"{options.head} head, {sizes[0]} training and {sizes[1]} validation images; classes: {named}"]
        self.notes += checked.notes

    def score(self, encoder: nn.Module) -> dict[str, float | None]:
        """Train a head on the encoder's features of the training part and score it on the validation part.

        The encoder is used in evaluation mode. Its weights, statistics, gradients and mode, and all states of
        randomness, stay as they are; the same encoder gives the same scores.

        Returns:
            IoU and Dice, of the object or the mean over classes, over the pixels of all windows; None where they are
            undefined or features are not finite.
        """
        device = next(encoder.parameters()).device
        head = HEADS[self.options.head](len(self.classes.names), self.options.side, self.options.seed)
        with frozen(encoder):
            if not head.fit(_features(encoder, self.train.images, device), self.train.masks):
                return {"IoU": None, "Dice": None}
            scorer = Scorer(
                self.classes.names,
                binary=len(self.classes.names) == 2 and self.classes.has_background,
                has_background=self.classes.has_background,
            )
            place = 0
            for maps in _features(encoder, self.val.images, device):
                for pred in head.predict(maps).numpy():
                    scorer.update_pred(self.val.names[place], pred, self.val.masks[place].numpy())
                    place += 1
        summary = scorer.summary(resamples=1)
        return {"IoU": summary["iou"], "Dice": summary["dice"]}


@contextmanager
def frozen(encoder: nn.Module) -> Iterator[None]:
    """Within it an encoder answers as in prediction, without gradients; afterwards all is as it was."""
    modes = [(module, module.training) for module in encoder.modules()]
    device = next(encoder.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        encoder.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


def _features(encoder: nn.Module, images: Tensor, device: torch.device) -> Iterator[list[Tensor]]:
    """Features of all windows, some at a time, as float32 on the CPU."""
    for batch in images.split(BATCH):
        yield [values.float().cpu() for values in feature_maps(encoder, batch.to(device))]


# ----------------------------------------------------------------------------------------------------------------------
# The labelled data set


def _check(options: ProbeOptions) -> tuple[Checked, ClassMap, ModelConfig]:
    """Find, scan and check the files.

    Raises:
        DatasetError: every message begins with the flag that named the data set.
    """
    try:
        train, val, note = find_splits(options.root, FileOptions(options.add_dirs))
        slides, _ = choose_tissue(train.pairs, options.slides, options.tissue)
        checked = check_dataset(train, val, options.classes, steps=options.preprocess, slides=slides)
        classes = checked.raise_errors()
        large = [item.pair for item in (*checked.train, *checked.val) if is_slide(item.pair, slides)]
        checked.warnings += prepare_slides(large, slides, classes)
    except DatasetError as error:
        raise DatasetError(f"--probe {options.root}: {error}") from error
    found = checked.train[0].channels + len(options.add_dirs)
    if found != len(options.channels):
        raise DatasetError(
            f"--probe {options.root}: its images have {found} channels, expected {len(options.channels)} "
            f"({', '.join(options.channels)}), as those that the encoder learns from: give another data set, or leave "
            "--probe out"
        )
    checked.notes.insert(0, note)
    side = options.side
    geometry = Geometry("crops", (side, side), tile=side, reduction=slides.reduction, mpp=slides.mpp)
    config = ModelConfig(
        architecture="probe",
        encoder="",
        labels=classes.labels,
        class_names=classes.names,
        channels=options.channels,
        mean=options.mean,
        std=options.std,
        geometry=geometry,
        add_dirs=options.add_dirs,
        preprocess=options.preprocess,
        tissue=slides.tissue,
    )
    return checked, classes, config


def _draw(
    facts: Sequence[PairFacts], classes: ClassMap, config: ModelConfig, options: ProbeOptions, *, forced: bool
) -> Windows:
    """Windows of images that lie evenly among all; every other one of `forced` must hold a labelled pixel."""
    sample_bytes = 4 * options.side**2 * len(options.channels)
    count = min(WINDOWS, max(BATCH, WINDOW_BYTES // sample_bytes))
    chosen = np.linspace(0, len(facts) - 1, min(count, len(facts))).round().astype(int).tolist()
    limits = ((0.0,) * len(options.channels), (255.0,) * len(options.channels))
    rgb = options.channels[:3] == ("red", "green", "blue")
    data = TrainingSet(
        [facts[number].pair for number in chosen], classes, config, Augmentation("none", rgb=rgb, value_range=limits)
    )
    seeds = np.random.default_rng([options.seed, int(forced)]).integers(0, 2**31, count).tolist()
    samples = []
    for place, number in enumerate(chosen):
        slots, present = [], classes_present(facts[number], classes)
        for turn, seed in enumerate(seeds[place :: len(chosen)]):
            wanted = present[turn // 2 % len(present)] if forced and present and turn % 2 == place % 2 else None
            slots.append(Slot(place, seed, wanted))
        samples += data[tuple(slots)]
    names, images, masks = zip(*samples, strict=True)
    return Windows(torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(masks)), names)
