"""Flags that two or more commands share, each declared once, and what turns them into values."""

import argparse
import difflib
import importlib.metadata
import math
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NoReturn

import settings

VERSION = "0.1.0"
ROOT = Path(__file__).resolve().parent
LIBRARIES = ("torch", "torchvision", "segmentation-models-pytorch", "timm", "numpy", "tifffile")


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Append each default to its help text, but not to required flags, switches and flags without a default."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.required or action.default in (None, False, "", (), argparse.SUPPRESS):
            return action.help
        return super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, which the list of all flags would push out of sight."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse words that are no flags, with the flags that they are near to."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [option for action in self._actions for option in action.option_strings]
            near = [match for word in unknown for match in difflib.get_close_matches(word.split("=")[0], flags, n=1)]
            hint = f"; did you mean {' '.join(near)}?" if near else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return found

    def error(self, message: str) -> NoReturn:
        """Leave with status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n(--help lists all flags)\n")


class _VersionAction(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:  # noqa: A002
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        facts = environment()
        lines = [f"tessera {facts.pop('tessera')}", *(f"{name} {value}" for name, value in facts.items())]
        sys.stdout.write("\n".join(lines) + "\n")
        parser.exit()


class _SplitWords(argparse.Action):
    """Takes a b and "a b" alike, as a list."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, " ".join(values).split())


class _JoinWords(argparse.Action):
    """Takes a b and "a b" alike, as one text."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, " ".join(values))


def make_parser(description: str) -> argparse.ArgumentParser:
    """Make a parser that appends each default to its help text, so no help text repeats one."""
    parser = _Parser(description=description, formatter_class=_HelpFormatter, allow_abbrev=False)
    parser.add_argument(
        "--settings", type=Path, metavar="FILE", help="JSON of flags, such as a run's args.json; the command line wins"
    )
    parser.add_argument("--version", action=_VersionAction, help="print version, commit and library versions")
    return parser


class UsageError(ValueError):
    """Flags that cannot be: unknown names, combinations, a device that is not there. Exit status 2."""


def add_switch(group: argparse._ArgumentGroup, *names: str, default: bool = False, help: str) -> None:  # noqa: A002
    """Add a flag --x with its opposite --no-x, so that a later word can take back an earlier one."""
    group.add_argument(*names, action=argparse.BooleanOptionalAction, default=default, help=help)


def add_run_args(
    parser: argparse.ArgumentParser,
    *,
    batch: int | None,
    workers: int = 2,
    predicts: bool = False,
    auto_batch: bool = False,
) -> None:
    """Add batch size, loader processes, seed and device; a command that only predicts has nothing random."""
    group = parser.add_argument_group("run")
    size = "tiles at a time; default: the pixels of a training batch" if batch is None else "images or crops at a time"
    size += "; auto: 16 on a GPU, halved once where its memory is too small" if auto_batch else ""
    kind = count_or_auto if auto_batch else positive_int
    group.add_argument("-b", "--batch", type=kind, default=batch, metavar="N", help=size)
    ahead = "batches that are read ahead; 0 reads in between" if predicts else "loader processes; 0 loads in this one"
    group.add_argument("-w", "--workers", type=natural, default=workers, metavar="N", help=ahead)
    if predicts:
        precisions = ("no", "bf16", "fp16")
        group.add_argument("--amp", choices=precisions, default="no", help="precision inside autocast, on a GPU")
    else:
        group.add_argument("--seed", type=natural, default=42, metavar="N", help="seed of everything random")
    add_device_args(group)


def add_device_args(group: argparse._ArgumentGroup) -> None:
    """Add where networks run, see pick_device."""
    group.add_argument(
        "--device",
        default="auto",
        metavar="NAME",
        help="auto (cuda, then mps, then cpu), cpu, cuda, cuda:N, mps, or for ONNX tensorrt",
    )
    add_switch(group, "--cpu", help="the same as --device cpu")


def add_log_args(parser: argparse.ArgumentParser, *, tables: bool = True) -> None:
    """Add the place of run folders and how their tables are written."""
    group = parser.add_argument_group("log")
    group.add_argument(
        "-log", "--log-dir", type=Path, default=Path("logs"), metavar="DIR", help="folder that holds the run folders"
    )
    group.add_argument(
        "--exp-name", default="", metavar="NAME", help="name of the run folder; empty: from the network and the data"
    )
    if tables:
        group.add_argument("--decimal", choices=("comma", "dot"), default="comma", help="decimal sign in csv files")


def add_checkpoint_args(
    parser: argparse.ArgumentParser, *, several: bool = False, every: bool = False, required: bool = True
) -> None:
    """Add the checkpoint file or the folder to find it in; `several` also takes a whole folder as an ensemble.

    `every` takes all checkpoints of a folder, one after another.
    """
    group = parser.add_argument_group("checkpoint")
    where = group.add_mutually_exclusive_group(required=required)
    where.add_argument(
        "-c", "--check-path", "-check", "-m", "--model", type=Path, metavar="FILE", help="checkpoint or ONNX file"
    )
    where.add_argument(
        "-cd", "--check-dir", type=Path, metavar="DIR", help="run folder, or a folder of them: the newest best is taken"
    )
    if every:
        where.add_argument("-d", "--dir", type=Path, metavar="DIR", help="every checkpoint in this folder")
    if several:
        add_switch(group, "--ensemble", help="average all checkpoints in the folder of -cd")


def add_backend_args(parser: argparse.ArgumentParser) -> None:
    """Add the choice of what runs the network."""
    parser.add_argument_group("backend").add_argument(
        "--backend",
        choices=("auto", "torch", "onnx"),
        default="auto",
        help="onnx: ONNX Runtime, 3 to 4 times faster on a CPU, after an export that is kept; auto: when it pays",
    )


def add_filter_args(parser: argparse.ArgumentParser) -> None:
    """Add what is done to the objects of a mask, in this order; sizes are in pixels of the mask."""
    group = parser.add_argument_group("objects, in this order")
    group.add_argument("--closing", type=natural, default=0, metavar="N", help="close gaps, ellipse N pixels wide")
    group.add_argument(
        "--fill-holes", type=int, default=0, metavar="N", help="fill holes of at most N pixels; -1 fills all"
    )
    group.add_argument("--min-area", type=natural, default=0, metavar="N", help="drop objects of fewer pixels")
    group.add_argument(
        "--relative-area",
        type=not_negative,
        default=0.0,
        metavar="K",
        help="drop objects whose area is below the mean of their class divided by K",
    )
    group.add_argument(
        "--min-length", type=natural, default=0, metavar="N", help="drop objects with a shorter centre line"
    )
    add_switch(group, "--keep-largest", help="keep the largest object of each class")


def add_tile_args(parser: argparse.ArgumentParser) -> None:
    """Add how images are cut and blended; without a flag it is the checkpoint's way."""
    group = parser.add_argument_group("tiles")
    add_tile_side_args(group)
    group.add_argument("--halo", type=natural, metavar="N", help="pixels along inner edges that get no weight")
    group.add_argument("--blend", choices=("hann", "gaussian", "constant"), help="weight of a tile's pixels")
    group.add_argument("--tta", choices=("none", "flips", "d4"), help="mean over 4 mirrored or 8 turned views")


def add_tile_side_args(group: argparse._ArgumentGroup) -> None:
    """Add how large tiles are and what neighbours share."""
    group.add_argument(
        "--tile-size", type=positive_int, metavar="S", help="side of a tile, or size that whole images are resized to"
    )
    group.add_argument(
        "--overlap", type=not_negative, metavar="X", help="shared by neighbours, in pixels; below 1: part of the tile"
    )


def add_result_args(parser: argparse.ArgumentParser, *, kinds: Sequence[str], required: bool = False) -> None:
    """Add what is written for each picture, how and where."""

    def words(text: str) -> tuple[str, ...]:
        found = text.replace(",", " ").split()
        if not found or not set(found) <= set(kinds):
            raise argparse.ArgumentTypeError(f"{text!r}: expected some of {', '.join(kinds)}, with commas between")
        return tuple(kind for kind in kinds if kind in found)

    group = parser.add_argument_group("results")
    group.add_argument("-o", "--output-dir", type=Path, required=required, metavar="DIR", help="where results go")
    group.add_argument(
        "--save",
        type=words,
        default="mask",
        metavar="KIND,...",
        help=f"what to write, with commas between: {', '.join(kinds)}",
    )
    group.add_argument(
        "--format",
        choices=("auto", "png", "tiff", "ome", "flat"),
        default="auto",
        help="of rasters; ome: pyramid for QuPath, flat: for OpenSlide; auto: png, or ome when large or on a map",
    )
    add_switch(group, "--geo", help="polygons in the map coordinates of a GeoTIFF, not in pixels")
    add_switch(group, "--overwrite", help="replace results of an earlier run with other flags")
    group.add_argument("--decimal", choices=("comma", "dot"), default="comma", help="decimal sign in csv files")


def add_split_args(parser: argparse.ArgumentParser, *, val_share: float | None) -> None:
    """Add the flags that choose files: ids, the share taken for validation, the region of interest."""
    group = parser.add_argument_group("files")
    group.add_argument("--ids", type=Path, metavar="CSV", help="use only the images named in its column id")
    group.add_argument(
        "--val-share",
        type=inner_share,
        default=val_share,
        metavar="X",
        help="part of a data set without val/ that is kept for validation, chosen by name",
    )
    group.add_argument(
        "--group-pattern",
        default=None,
        metavar="REGEX",
        help="file names that agree in its first group stay on one side of the split, such as '^(patient\\d+)'",
    )
    group.add_argument(
        "--roi-dir", default=None, metavar="NAME", help="folder beside images/ with masks of the region that counts"
    )


def add_recipe_args(parser: argparse.ArgumentParser) -> None:
    """Add the choice of a named bundle of flags."""
    parser.add_argument(
        "--recipe",
        choices=settings.recipe_names(),
        help="flags that go together, printed as the command they stand for; the command line wins",
    )


def add_data_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags about a labelled data set: its root, its splits, its channels and its classes."""
    add_split_args(parser, val_share=0.2)
    group = parser.add_argument_group("data")
    group.add_argument("-d", "--dataset", type=Path, required=True, metavar="DIR", help="data set root")
    group.add_argument("-val", "--val-dir", type=Path, metavar="DIR", help="validation split that lies elsewhere")
    group.add_argument("--val-ids", type=Path, metavar="CSV", help="validate on the images named in its column id")
    add_label_args(group)
    add_mask_value_args(group)
    group.add_argument(
        "--preprocess", nargs="+", choices=("clahe", "denoise", "stretch"), default=[], help="steps before statistics"
    )
    add_slide_args(parser)


def add_label_args(group: argparse._ArgumentGroup) -> None:
    """Add the channels beside those of the images, and what mask labels mean."""
    add_channel_args(group)
    add_class_args(group)


def add_channel_args(group: argparse._ArgumentGroup) -> None:
    """Add the channels beside those of the images."""
    group.add_argument(
        "--add-dirs",
        nargs="+",
        action=_SplitWords,
        default=[],
        metavar="NAME",
        help="folders beside images/ with an extra channel each",
    )


def add_class_args(group: argparse._ArgumentGroup) -> None:
    """Add what mask labels mean."""
    group.add_argument(
        "--class-list",
        nargs="+",
        action=_JoinWords,
        metavar="LABEL",
        help="mask labels to learn, such as 64 128; nonzero: any other than 0; without it masks of 0 and x mean x",
    )
    group.add_argument("--class-names", nargs="+", metavar="NAME", help="names of the labels, in their order")
    group.add_argument("--ignore-label", type=natural, metavar="N", help="mask label that counts nowhere")


def add_mask_value_args(group: argparse._ArgumentGroup) -> None:
    """Add meanings of mask values that need no list."""
    group.add_argument("--max-mask-val", type=natural, default=0, metavar="N", help="learn the labels 1 to N instead")
    group.add_argument("--mask-threshold", type=float, metavar="T", help="mask values above it are the object")


def add_slide_args(parser: argparse.ArgumentParser) -> None:
    """Add how slides, and other images, are read for training: at which scale, and where in slides."""
    group = parser.add_argument_group("slides")
    scale = group.add_mutually_exclusive_group()
    scale.add_argument("--reduce", type=positive_float, metavar="X", help="read X times smaller, X >= 1")
    scale.add_argument("--mpp", type=positive_float, metavar="UM", help="read at so many micrometres per pixel")
    add_tissue_arg(group)


def add_decoded_arg(group: argparse._ArgumentGroup) -> None:
    """Add how large an image may be that must be decoded whole."""
    group.add_argument(
        "--max-decoded-gb",
        type=positive_float,
        default=4.0,
        metavar="GB",
        help="largest image that is decoded whole, for formats that cannot be read by windows",
    )


def add_tissue_arg(group: argparse._ArgumentGroup) -> None:
    """Add where on slides windows are taken and predicted."""
    group.add_argument(
        "--tissue",
        choices=("auto", "saturation", "otsu", "none"),
        default="auto",
        help="keep to what a thumbnail of a slide shows as tissue; auto: as in training, which decides by the colours",
    )


def add_threshold_args(parser: argparse.ArgumentParser) -> None:
    """Add the decision limit of one-class networks."""
    parser.add_argument_group("decision").add_argument(
        "-t",
        "--thres",
        type=threshold,
        default=0.5,
        metavar="T",
        help="object where p >= T; best: the checkpoint's own",
    )


def pick_threshold(wanted: float | str, known: Mapping[str, float], num_logits: int = 1) -> float:
    """The number behind --thres.

    Raises:
        UsageError: `best` was asked for and the checkpoint has none, or a number for a network of several classes.
    """
    if wanted == "best" and "best" not in known:
        raise UsageError("-t best: the checkpoint stores no best threshold (it has several classes); use -t 0.5")
    number = known["best"] if wanted == "best" else float(wanted)
    if num_logits > 1 and number != 0.5:
        raise UsageError(f"-t {number:g} is for one class; of several the likeliest wins, without a threshold")
    return number


def add_score_args(parser: argparse.ArgumentParser) -> None:
    """Add what scoring needs: the rule for empty classes and the trivial baselines."""
    group = parser.add_argument_group("scores")
    group.add_argument(
        "--empty",
        choices=("skip", "one", "zero"),
        default="skip",
        help="what an image or class without pixels in truth and prediction scores",
    )
    add_switch(
        group, "--baselines", help="also score all-foreground and Otsu's threshold on the same images (one class)"
    )
    group.add_argument(
        "--worst", type=natural, default=4, metavar="N", help="images with the lowest IoU to show in TensorBoard"
    )


@contextmanager
def said_once() -> Iterator[None]:
    """Silence within all but the first of the processes that torchrun started; for what all of them say alike."""
    if os.environ.get("RANK", "0") == "0":
        yield
        return
    with Path(os.devnull).open("w") as nothing, redirect_stdout(nothing), redirect_stderr(nothing):
        yield


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse argv; flags of a recipe and of a --settings file are put before it, so the command line wins."""
    words = [str(word) for word in (sys.argv[1:] if argv is None else argv)]
    return parser.parse_args(settings.with_settings(parser, words))


@contextmanager
def plain_errors(parser: argparse.ArgumentParser, *, interrupted: str = "") -> Iterator[None]:
    """Turn errors about flags into exit status 2, about files, data and training into one message and status 1.

    With TESSERA_TRACEBACK=1 in the environment they are raised as they are.

    Args:
        interrupted: what to say after Ctrl-C, such as how to go on.
    """
    try:
        yield
    except BrokenPipeError:  # whoever read our lines has gone, such as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (OSError, ValueError, RuntimeError) as error:
        if os.environ.get("TESSERA_TRACEBACK") == "1":
            raise
        if isinstance(error, UsageError):
            parser.error(str(error))
        parser.exit(1, f"{parser.prog}: error: {plain_message(error)}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted{interrupted and '; '}{interrupted}\n")


def exit_with_findings(parser: argparse.ArgumentParser, findings: Sequence[str]) -> None:
    """Exit with status 1 and the list of what went wrong, after everything else was done; return when nothing did."""
    if findings:
        listed = "\n".join(f"  - {message}" for message in findings)
        count = f"{len(findings)} finding{'s' if len(findings) > 1 else ''}"
        parser.exit(1, f"{parser.prog}: error: {count}, the rest is done:\n{listed}\n")


def plain_message(error: BaseException) -> str:
    """The message of an error; of one that PyTorch carried over from a loader process, its own words alone."""
    text = str(error)
    if text.startswith("Caught ") and "Original Traceback" in text:
        last = list(re.finditer(r"^[\w.]*(?:Error|Exception)\w*: ", text, re.MULTILINE))
        return text[last[-1].end() :].strip() if last else text
    return text


def pick_device(name: str, cpu: bool = False) -> str:
    """Turn --device into the name of a device that is there; only `auto` chooses.

    Raises:
        UsageError: the device asked for is absent or unknown.
    """
    import torch

    if cpu:
        name = "cpu"
    if name == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda", "mps", "tensorrt"):
        raise UsageError(f"--device {name} is unknown; expected auto, cpu, cuda, cuda:N, mps or tensorrt")
    if not (number or "0").isdecimal():
        raise UsageError(f"--device {name}: {number!r} is no number of a device; expected such as cuda:1")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise UsageError(f"--device {name}: PyTorch sees {found} CUDA devices; use --device auto or --cpu")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UsageError("--device mps: PyTorch sees no Apple GPU; use --device auto or --cpu")
    return name


def without_partners(
    args: argparse.Namespace, parser: argparse.ArgumentParser, partners: Mapping[str, tuple[Any, Sequence[str]]]
) -> list[str]:
    """A warning for each group of flags that were given and change nothing, for want of another one.

    Args:
        parser: knows the defaults.
        partners: what each group needs, whether it is there, and the group as names in the namespace.
    """
    lines = []
    for partner, (there, names) in partners.items():
        given = [name for name in names if getattr(args, name) != parser.get_default(name)]
        if given and not there:
            flags = " ".join(f"--{name.strip('_').replace('_', '-')}" for name in given)
            lines.append(f"warning: without {partner} nothing is done with {flags}")
    return lines


def share_cores() -> None:
    """Make the threads that read, compute and write at the same time hand over to each other; before torch is imported.

    A 1x1 convolution over a slide takes two thirds of the time on two cores. OpenMP is left alone where the environment
    says how it waits.
    """
    import cv2

    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads sleep, where others have work for the core
    cv2.setNumThreads(1)  # the network has the cores; OpenCV's own threads would make it wait
    sys.setswitchinterval(1e-4)  # Python's lock changes hands within a millisecond's work


def environment() -> dict[str, str]:
    """Versions that a run depends on: ours, the commit, Python, the libraries."""
    facts = {"tessera": VERSION, "commit": _git_commit(), "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            facts[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            facts[name] = "not installed"
    return facts


def _git_commit() -> str:
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def run_record(args: argparse.Namespace, argv: Sequence[str] | None) -> dict[str, Any]:
    """What args.json holds: parsed values, the command line, commit and versions."""
    flags = {name: _plain(value) for name, value in vars(args).items() if name not in settings.NEVER}
    words = sys.argv if argv is None else [Path(sys.argv[0]).name, *argv]
    return {"flags": flags, "command": shlex.join(map(str, words)), "environment": environment()}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def positive_int(text: str) -> int:
    """Argparse type: a whole number of at least 1."""
    return _number(text, int, 1, None)


def count_or_auto(text: str) -> int | str:
    """Argparse type: a whole number of at least 1, or the word auto."""
    return text if text == "auto" else positive_int(text)


def natural(text: str) -> int:
    """Argparse type: a whole number of at least 0."""
    return _number(text, int, 0, None)


def share(text: str) -> float:
    """Argparse type: a number from 0 to 1."""
    return _number(text, float, 0, 1)


def inner_share(text: str) -> float:
    """Argparse type: a number between 0 and 1, neither of them."""
    value = share(text)
    if value in (0, 1):
        raise argparse.ArgumentTypeError(f"{text} leaves one side empty: expected a number between 0 and 1")
    return value


def threshold(text: str) -> float | str:
    """Argparse type: a number from 0 to 1, or the word best."""
    return text if text == "best" else share(text)


def not_negative(text: str) -> float:
    """Argparse type: a number of at least 0."""
    return _number(text, float, 0, None)


def positive_float(text: str) -> float:
    """Argparse type: a number above 0."""
    value = not_negative(text)
    if value == 0:
        raise argparse.ArgumentTypeError("expected a number above 0")
    return value


def _number(text: str, kind: type, low: float, high: float | None) -> Any:
    limits = f"of at least {low}" if high is None else f"from {low} to {high}"
    try:
        value = kind(text)
    except ValueError:
        expected = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{text!r} is not {expected}") from None
    if not (low <= value < math.inf and (high is None or value <= high)):
        raise argparse.ArgumentTypeError(f"{text} is out of range: expected a number {limits}")
    return value
