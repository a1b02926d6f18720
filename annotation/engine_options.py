"""Which engines there are, what follows from the weights that are given, and the flags of all of them.

An engine is a name, or two with a plus: `yolo+sam` gives the boxes of the detector to SAM, `watershed+sam` those of the
watershed's objects. `sam` alone looks at everything. Imports nothing heavy.
"""

import argparse
import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import cli
from annotation import detector_options as detectors
from annotation import merge_options, presets, sam_options, trained_options

SINGLE = ("watershed", "yolo", "sam", "model")
PROMPTED = ("yolo+sam", "watershed+sam", "model+sam")
NAMES = (*SINGLE, *PROMPTED)
WEIGHTS_SUFFIXES = (".json", ".safetensors", ".bin")  # in a folder of transformers


@dataclass(frozen=True)
class EngineOptions:
    """The engines of a run and all their settings.

    Attributes:
        names: some of NAMES, in the order in which they count.
        sam_path: weights of SAM.
        device: of networks.
    """

    names: tuple[str, ...] = ("watershed",)
    merge: merge_options.MergeOptions = merge_options.MergeOptions()
    watershed: presets.WatershedOptions = presets.WatershedOptions()
    detector: detectors.DetectorOptions = detectors.DetectorOptions()
    slices: detectors.SliceOptions = detectors.SliceOptions()
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
        trained = self.trained and replace(self.trained, path=Path(), batch=None)
        own = asdict(replace(self, sam=sam, detector=detector, trained=trained))
        relevant = {name: own[name] for name in ("names", "merge", *SETTINGS) if name in fields_of(self.parts)}
        files = [self.detector.weights, self.sam_path, self.trained.path if self.trained else None]
        content = [_digest_of(path) for path in files if path is not None]
        return hashlib.sha256(repr((sorted(relevant.items()), content)).encode()).hexdigest()


SETTINGS = {"watershed": ["watershed"], "detector": ["yolo"], "slices": ["yolo"], "sam": ["sam"], "trained": ["model"]}


def fields_of(parts: set[str]) -> set[str]:
    """The fields of EngineOptions that some engines read."""
    return {"names", "merge", *(name for name, readers in SETTINGS.items() if parts.intersection(readers))}


def _digest_of(path: Path) -> str:
    """Of the content of a file, or of the files in a folder that hold weights or describe them."""
    if path.is_dir():
        files = [each for each in sorted(path.iterdir()) if each.suffix in WEIGHTS_SUFFIXES and each.is_file()]
        return hashlib.sha256(repr([(each.name, _digest_of(each)) for each in files]).encode()).hexdigest()
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
    merge_options.add_merge_args(parser)
    presets.add_watershed_args(parser)
    detectors.add_detector_args(parser)
    detectors.add_slice_args(parser)
    sam_options.add_sam_args(parser)
    cli.add_checkpoint_args(parser, required=False)
    cli.add_backend_args(parser)
    cli.add_threshold_args(parser)
    trained_options.add_trained_args(parser)


def pick_device(args: argparse.Namespace) -> str:
    """The device for networks; without weights PyTorch is not even loaded."""
    if not (args.detector or args.sam or args.check_path or args.check_dir):
        return "cpu"
    import backends

    return backends.pick_device(args.device, args.cpu, args.check_path)


def options_from(args: argparse.Namespace, device: str) -> EngineOptions:
    """The options behind the flags of add_engine_args.

    Raises:
        UsageError: an unknown engine, or one without its weights.
        FileNotFoundError: weights that do not exist.
    """
    options = EngineOptions(
        names=choose_names(args),
        merge=merge_options.options_from(args),
        watershed=presets.options_from(args),
        detector=detectors.detector_options_from(args),
        slices=detectors.slice_options_from(args),
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
        "yolo": [detectors.DETECTOR_SPACE, detectors.SLICE_SPACE],
        "sam": [sam_options.SPACE],
        "model": [trained_options.SPACE],
    }
    found: dict[str, Any] = {}
    for part in sorted(options.parts):
        for space in spaces[part]:
            found |= dict(space)
    return found | (dict(merge_options.SPACE) if len(options.names) > 1 else {})


def with_settings(args: argparse.Namespace, settings: Mapping[str, Any], device: str) -> EngineOptions:
    """The options with some flags set otherwise."""
    return options_from(argparse.Namespace(**{**vars(args), **settings}), device)
