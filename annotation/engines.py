"""Which engines look at an image, how one prompts another, and how their objects become one set.

An engine is a name, or two with a plus: `yolo+sam` gives the boxes of the detector to SAM, `watershed+sam` those of the
watershed's objects. `sam` alone looks at everything.
"""

import argparse
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import cli
from annotation import detectors, merging, presets, sam_options, slicing, trained_options
from annotation.boxes import Boxes
from annotation.instances import Instances

SINGLE = ("watershed", "yolo", "sam", "model")
PROMPTED = ("yolo+sam", "watershed+sam", "model+sam")
NAMES = (*SINGLE, *PROMPTED)

Cache = dict[Any, Any]  # what was found in one image before, see Engines.find


@dataclass(frozen=True)
class EngineOptions:
    """The engines of a run and all their settings.

    Attributes:
        names: some of NAMES, in the order in which they count.
        sam_path: weights of SAM.
        device: of networks.
    """

    names: tuple[str, ...] = ("watershed",)
    merge: merging.MergeOptions = merging.MergeOptions()
    watershed: presets.WatershedOptions = presets.WatershedOptions()
    detector: detectors.DetectorOptions = detectors.DetectorOptions()
    slices: slicing.SliceOptions = slicing.SliceOptions()
    sam_path: Path | None = None
    sam: sam_options.SamOptions = sam_options.SamOptions()
    trained: trained_options.TrainedOptions | None = None
    device: str = "cpu"

    @property
    def parts(self) -> set[str]:
        """The single engines that take part."""
        return {part for name in self.names for part in name.split("+")}

    def digest(self) -> str:
        """Of all settings that change objects, and of the weights' content."""
        sam = replace(self.sam, cache=None, cache_gb=0, chunk=1)  # whatever these are, the objects are alike
        detector = replace(self.detector, weights=None)  # the content of weights counts, not their place
        trained = self.trained and replace(self.trained, path=Path())
        own = asdict(replace(self, sam=sam, detector=detector, trained=trained))
        relevant = {name: own[name] for name in ("names", "merge", *SETTINGS) if name in _fields_of(self.parts)}
        files = [self.detector.weights, self.sam_path, self.trained.path if self.trained else None]
        content = [_digest_of(path) for path in files if path is not None]
        return hashlib.sha256(repr((sorted(relevant.items()), content)).encode()).hexdigest()


SETTINGS = {"watershed": ["watershed"], "detector": ["yolo"], "slices": ["yolo"], "sam": ["sam"], "trained": ["model"]}


def _fields_of(parts: set[str]) -> set[str]:
    """The fields of EngineOptions that some engines read."""
    return {"names", "merge", *(name for name, readers in SETTINGS.items() if parts.intersection(readers))}


def _digest_of(path: Path) -> str:
    """Of a file's content, or of the names and sizes in a folder."""
    if path.is_dir():
        listed = [(str(each.relative_to(path)), each.stat().st_size) for each in sorted(path.rglob("*"))]
        return hashlib.sha256(repr(listed).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def add_engine_args(parser: argparse.ArgumentParser) -> None:
    """Add the choice of engines and the flags of each."""
    group = parser.add_argument_group("engines")
    group.add_argument(
        "--engines",
        metavar="NAME,...",
        help=f"some of {' '.join(NAMES)}; default: what follows from the weights that are given, or watershed",
    )
    merging.add_merge_args(parser)
    presets.add_watershed_args(parser)
    detectors.add_detector_args(parser)
    slicing.add_slice_args(parser)
    sam_options.add_sam_args(parser)
    where = parser.add_argument_group("checkpoint of a trained network").add_mutually_exclusive_group()
    where.add_argument("-c", "--check-path", type=Path, metavar="FILE", help="checkpoint or ONNX file")
    where.add_argument("-cd", "--check-dir", type=Path, metavar="DIR", help="run folder: the newest best is taken")
    cli.add_backend_args(parser)
    cli.add_threshold_args(parser)
    trained_options.add_trained_args(parser)


def options_from(args: argparse.Namespace, device: str) -> EngineOptions:
    """The options behind the flags of add_engine_args.

    Raises:
        UsageError: an unknown engine, or one without its weights.
        FileNotFoundError: weights that do not exist.
    """
    options = EngineOptions(
        names=choose_names(args),
        merge=merging.options_from(args),
        watershed=presets.options_from(args),
        detector=detectors.options_from(args),
        slices=slicing.options_from(args),
        sam_path=args.sam,
        sam=sam_options.options_from(args),
        trained=trained_options.options_from(args),
        device=device,
    )
    for part, given, flag in (
        ("yolo", options.detector.weights, "--detector FILE"),
        ("sam", options.sam_path, "--sam PATH"),
        ("model", options.trained, "-c FILE or -cd DIR"),
    ):
        if part in options.parts and given is None:
            raise cli.UsageError(f"the engine {part} needs weights: give {flag}")
        if part not in options.parts and given is not None:
            raise cli.UsageError(
                f"{flag.split()[0]} is given, but --engines {','.join(options.names)} does not use it: add {part} to "
                "--engines, or leave the weights out"
            )
    for path, what in ((options.detector.weights, "detector"), (options.sam_path, "weights of SAM")):
        if path is not None and not path.exists():
            raise FileNotFoundError(f"{path}: no such {what}; expected a file that is there (nothing is downloaded)")
    return options


def choose_names(args: argparse.Namespace) -> tuple[str, ...]:
    """The engines asked for, or those that follow from the weights: a detector, SAM prompted by it, a network.

    Raises:
        UsageError: an unknown name, or one twice.
    """
    if args.engines is None:
        names = []
        if args.detector or args.sam:
            names.append("+".join(name for name, given in (("yolo", args.detector), ("sam", args.sam)) if given))
        if args.check_path or args.check_dir:
            names.append("model")
        return tuple(names) or ("watershed",)
    names = [word.strip() for word in args.engines.split(",") if word.strip()]
    for name in names:
        if name not in NAMES:
            raise cli.UsageError(f"--engines: {name!r} is unknown; expected some of {', '.join(NAMES)}")
    if not names or len(set(names)) < len(names):
        raise cli.UsageError(f"--engines {args.engines!r}: expected one or more of {', '.join(NAMES)}, each once")
    return tuple(names)


def space_of(options: EngineOptions) -> dict[str, Any]:
    """What tuning may change: names of flags to values, see annotation.tuning."""
    spaces: dict[str, list[Mapping[str, Any]]] = {
        "watershed": [presets.SPACE],
        "yolo": [detectors.SPACE, slicing.SPACE],
        "sam": [sam_options.SPACE],
        "model": [trained_options.SPACE],
    }
    found: dict[str, Any] = {}
    for part in sorted(options.parts):
        for space in spaces[part]:
            found |= dict(space)
    return found | (dict(merging.SPACE) if len(options.names) > 1 else {})


class Engines:
    """The engines of a run with their networks loaded, each once."""

    def __init__(self, options: EngineOptions, *, megapixels: float | None = None) -> None:
        """Load what the options name.

        Args:
            megapixels: what a trained network is to see in all, for its backend auto.
        """
        self.options = options
        self.notes: list[str] = []
        self._detector: Any = None
        self._sam: Any = None
        self._trained: Any = None
        if "yolo" in options.parts:
            self._detector = detectors.load_detector(options.detector, options.device)
            if self._detector.note:
                self.notes.append(f"{self._detector.name}: {self._detector.note}")
        if "sam" in options.parts and options.sam_path is not None:
            from annotation.sam import load_sam

            self._sam = load_sam(options.sam_path, options.device, options.sam)
        if "model" in options.parts and options.trained is not None:
            from annotation.trained import load_trained

            self._trained = load_trained(options.trained, options.device, megapixels=megapixels)
            self.notes.append(f"{options.trained.path}: {self._trained.note}")

    def all_notes(self) -> list[str]:
        """What is to be said about the networks, and about the images so far."""
        return [*self.notes, *(self._trained.notes if self._trained else ())]

    def changed(self, options: EngineOptions) -> "Engines":
        """The same networks, which are not loaded again, with other settings."""
        other = object.__new__(Engines)
        other.options, other.notes = options, self.notes
        other._detector = self._detector and self._detector.changed(options.detector)
        other._sam, other._trained = self._sam, self._trained
        if self._sam is not None:
            from annotation.sam import Sam

            other._sam = Sam(self._sam.network, options.sam)
        if self._trained is not None:
            other._trained = replace(self._trained, options=options.trained)
        return other

    def fixed(self, sample: np.ndarray) -> "Engines":
        """The same with all that is automatic chosen from a sample, so that parts of one image are treated alike."""
        if "watershed" not in self.options.parts:
            return self
        from annotation.watershed import choose_options

        return self.changed(replace(self.options, watershed=choose_options(sample, self.options.watershed)))

    def find(self, image: np.ndarray, cache: Cache | None = None) -> tuple[Instances, dict[str, Instances]]:
        """The objects of an image (H, W, C), RGB then extras, and those of each engine.

        Args:
            cache: kept from call to call for one image; engines whose settings are the same do not work again.
        """
        cache = {} if cache is None else cache
        parts = {name: self._run(name, image, cache) for name in self.options.names}
        if len(parts) == 1:
            return next(iter(parts.values())), parts
        return merging.merge(list(parts.values()), self.options.merge), parts

    def _run(self, name: str, image: np.ndarray, cache: Cache) -> Instances:
        """One engine, prompted by another where the name has two."""
        own = _fields_of(set(name.split("+"))) - {"names", "merge"}
        key = name, *(repr(getattr(self.options, field)) for field in sorted(own))
        if key not in cache:
            first, _, second = name.partition("+")
            if second:
                boxes = self._boxes(first, image, cache)
                cache[key] = rename(self._sam.segment_boxes(image, boxes), name)
            else:
                cache[key] = self._single(first)(image)
        return cache[key]

    def _single(self, name: str) -> Callable[[np.ndarray], Instances]:
        if name == "watershed":
            from annotation.watershed import segment

            return lambda image: segment(image, self.options.watershed)
        if name == "yolo":
            return lambda image: detectors.boxes_to_instances(self._detect(image), *image.shape[:2])
        return self._sam.segment_everything if name == "sam" else self._trained.segment

    def _detect(self, image: np.ndarray) -> Boxes:
        return slicing.detect_sliced(self._detector, image, self.options.slices)

    def _boxes(self, name: str, image: np.ndarray, cache: Cache) -> np.ndarray:
        """What prompts SAM: (n, 4) left, top, right, bottom."""
        if name == "yolo":
            return self._detect(image).xyxy
        found = self._run(name, image, cache)
        return merging.boxes_of(found.labels, len(found))[:, [1, 0, 3, 2]]


def rename(found: Instances, engine: str) -> Instances:
    """The same objects, said to be found by another name."""
    return replace(found, engines=(engine,) * len(found))


def with_settings(args: argparse.Namespace, settings: Mapping[str, Any], device: str) -> EngineOptions:
    """The options with some flags set otherwise."""
    return options_from(argparse.Namespace(**{**vars(args), **settings}), device)
