"""Flags of pretrain.py: declared, checked, and as the modules take them."""

import argparse
import glob
from pathlib import Path
from typing import Any

import cli

METHODS = ("barlow", "moco", "mocov3", "dense", "mae")  # of selfsupervised.interface, which takes seconds to import
VIEWS = ("natural", "microscopy", "histology", "aerial", "multispectral")
BASE_BATCH = 256  # that -lr is for
# For BASE_BATCH: 1e-3 at 64, found on small networks; Barlow Twins; MoCo
RATES = {"AdamW": 4e-3, "LARS": 0.2, "SGD": 0.03}
MAE_RATE = 1e-3  # of AdamW for --method mae: vision transformers want less
DECAYS = {"AdamW": 1e-4, "LARS": 1e-6, "SGD": 1e-4}


def add_image_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags about images and the views that are made of them."""
    group = parser.add_argument_group("images")
    group.add_argument(
        "--images",
        nargs="+",
        required=True,
        metavar="DIR",
        help="folders of images or slides, files or globs; of a folder that holds images/ that one is meant, never gt/",
    )
    cli.add_channel_args(group)
    group.add_argument(
        "--preprocess", nargs="+", choices=("clahe", "denoise", "stretch"), default=[], help="steps before statistics"
    )
    cli.add_slide_args(parser)
    group = parser.add_argument_group("views")
    group.add_argument(
        "--image-size", type=cli.positive_int, nargs="+", default=[128], metavar="S", help="side of a view, one number"
    )
    group.add_argument(
        "--crops", type=cli.natural, default=4, metavar="N", help="pairs of views from each image in an epoch"
    )
    group.add_argument(
        "--window",
        type=cli.not_negative,
        default=1.5,
        metavar="X",
        help="side of the random window that a pair is cut from, in sides of a view; 0: the whole image",
    )
    group.add_argument(
        "--views-from", choices=("crop", "neighbours"), default="crop", help="one window, or two that lie side by side"
    )
    group.add_argument(
        "--views",
        choices=("auto", *VIEWS),
        default="auto",
        help="what may differ between two views; auto: natural for RGB, multispectral for others",
    )


def add_method_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags about the encoder and the method that trains it."""
    group = parser.add_argument_group("method")
    group.add_argument(
        "--method",
        choices=METHODS,
        default="barlow",
        help="how it learns; dense: places, not images; mae: hidden patches of a vision transformer",
    )
    group.add_argument("--encoder", default="resnet18", metavar="NAME", help="encoder of train.py: smp, timm, plain-N")
    group.add_argument(
        "--encoder-weights", default="none", metavar="W", help="start: none, imagenet (downloaded) or a file of weights"
    )
    group.add_argument(
        "--projector",
        type=widths,
        default=(),
        metavar="N-N-N",
        help="widths of the projector; without it 1024-1024-1024, for mocov3 1024-256, for moco that of the features "
        "and 128",
    )
    group.add_argument(
        "--lambda",
        dest="lambda_",
        type=cli.not_negative,
        default=0.005,
        metavar="X",
        help="barlow and dense: weight of what dimensions have in common",
    )
    group.add_argument(
        "--temperature",
        type=cli.positive_float,
        default=0.2,
        metavar="X",
        help="moco and mocov3: what similarities are divided by",
    )
    group.add_argument(
        "--momentum-encoder",
        type=cli.share,
        default=0.99,
        metavar="X",
        help="moco and mocov3: share of the teacher that stays at each step",
    )
    group.add_argument(
        "--queue",
        type=cli.positive_int,
        metavar="N",
        help="moco: keys of earlier batches; default: half of the views of an epoch, at most 16384",
    )
    group.add_argument(
        "--dense-points", type=cli.positive_int, default=32, metavar="N", help="dense: places compared in each pair"
    )
    group.add_argument(
        "--dense-global", type=cli.share, default=0.5, metavar="X", help="dense: share of the loss of whole views"
    )
    group.add_argument(
        "--mask-share", type=cli.inner_share, default=0.75, metavar="X", help="mae: share of hidden patches"
    )


def add_optimisation_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags about the optimiser and what a step is."""
    group = parser.add_argument_group("optimisation")
    group.add_argument(
        "-e", "--epochs", type=cli.positive_int, default=100, metavar="N", help="epochs in all, also on resume"
    )
    group.add_argument(
        "-lr",
        "--lr",
        type=cli.positive_float,
        metavar="X",
        help=f"highest rate for a batch of {BASE_BATCH}, scaled by the batch of all processes; default: "
        + ", ".join(f"{rate:g} for {name}" for name, rate in RATES.items())
        + f", {MAE_RATE:g} for mae with AdamW",
    )
    group.add_argument(
        "--optim",
        default="AdamW",
        metavar="NAME",
        help="AdamW, LARS, SGD, or another of train.py with an -lr of its own",
    )
    group.add_argument(
        "--weight-decay",
        type=cli.not_negative,
        metavar="X",
        help="decay of weights, not of biases; default: 1e-4, 1e-6 for LARS",
    )
    group.add_argument(
        "--momentum", type=cli.share, default=0.9, metavar="X", help="momentum of SGD (Nesterov's) and LARS"
    )
    group.add_argument(
        "--warmup",
        type=cli.not_negative,
        metavar="N",
        help="epochs of rising rate; default: a tenth of --epochs, at most 10",
    )
    group.add_argument("--amp", choices=("no", "bf16", "fp16"), default="no", help="precision inside autocast")
    group.add_argument(
        "--accumulate", type=cli.positive_int, default=1, metavar="N", help="batches for one step; moco and mae alone"
    )
    group.add_argument(
        "--clip", type=cli.not_negative, default=0, metavar="X", help="largest gradient norm; 0: no limit"
    )
    cli.add_switch(group, "--sync-bn", help="batch normalisation of the encoder over the batches of all processes")
    group.add_argument(
        "--channels-last", action=argparse.BooleanOptionalAction, default=True, help="memory layout of tensors"
    )


def add_watch_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags about what is looked at while it learns."""
    group = parser.add_argument_group("watching")
    group.add_argument(
        "--probe-every",
        type=cli.positive_int,
        default=10,
        metavar="N",
        help="epochs between two looks at the encoder: its file, ranks, pictures and probe; always after the last",
    )
    group.add_argument(
        "--probe",
        type=Path,
        metavar="DIR",
        help="labelled data set that a small head on the frozen encoder is scored on",
    )
    group.add_argument("--probe-head", choices=("linear", "decoder"), default="linear", help="that head")
    cli.add_switch(group, "--allow-collapse", help="go on when all images get the same embedding")
    group = parser.add_argument_group("labels of --probe")
    cli.add_class_args(group)
    cli.add_mask_value_args(group)


def widths(text: str) -> tuple[int, ...]:
    """Argparse type: whole numbers with hyphens between."""
    words = text.split("-")
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise argparse.ArgumentTypeError(f"{text!r}: expected widths with hyphens between, such as 1024-1024-1024")
    return tuple(map(int, words))


def check_flags(args: argparse.Namespace) -> None:
    """Refuse unknown names and numbers that cannot be, and put in what defaults depend on, before files are read.

    Raises:
        cli.UsageError: names the flag or what it may be.
    """
    from model import resolve_encoder
    from networks.plain_unet import PLAIN_WIDTHS
    from optim import resolve_optimiser
    from selfsupervised.views import ViewOptions
    from train_options import weights_file

    if args.reduce and args.reduce < 1:
        raise cli.UsageError(f"--reduce {args.reduce:g} would enlarge the images; expected 1 or more")
    if len(args.image_size) > 1:
        raise cli.UsageError(f"--image-size {' '.join(map(str, args.image_size))}: views are square; give one number")
    if not args.crops:
        raise cli.UsageError("--crops 0 leaves no views; expected 1 or more")
    path = weights_file(args)
    if path and not path.is_file():
        raise cli.UsageError(f"--encoder-weights {path}: no such file")
    labels = {"--class-list": args.class_list, "--class-names": args.class_names, "--ignore-label": args.ignore_label}
    labels |= {"--max-mask-val": args.max_mask_val or None, "--mask-threshold": args.mask_threshold}
    for flag, given in labels.items():
        if given is not None and not args.probe:
            raise cli.UsageError(f"{flag} says what the labels of --probe mean; give --probe DIR too, or leave it out")
    try:
        args.encoder = resolve_encoder(args.encoder, "plain-unet" if args.encoder.strip() in PLAIN_WIDTHS else "unet")
        ViewOptions(side(args), args.window, args.views_from)
        args.optim = resolve_optimiser(args.optim)
    except ValueError as error:
        own = f"; the plain U-Net's are {', '.join(PLAIN_WIDTHS)}" if "unknown encoder" in str(error) else ""
        raise cli.UsageError(f"{error}{own}") from error
    if args.lr is None and args.optim not in RATES:
        raise cli.UsageError(f"--optim {args.optim} has no rate of its own here; give -lr for a batch of {BASE_BATCH}")
    if args.lr is None:
        args.lr = MAE_RATE if args.method == "mae" and args.optim == "AdamW" else RATES[args.optim]
    args.weight_decay = DECAYS.get(args.optim, 1e-4) if args.weight_decay is None else args.weight_decay
    args.warmup = min(10.0, args.epochs / 10) if args.warmup is None else args.warmup


def side(args: argparse.Namespace) -> int:
    """Height and width of a view."""
    return int(args.image_size[0])


def image_words(args: argparse.Namespace) -> list[Path]:
    """What --images names, globs that no shell has expanded by their files."""
    found: list[Path] = []
    for word in args.images:
        inside = [] if Path(word).exists() else sorted(glob.glob(word, recursive=True))  # noqa: PTH207 - may be absolute
        found += [Path(name) for name in inside or [word]]
    return found


def check_processes(args: argparse.Namespace, device: str, processes: Any) -> None:
    """Refuse what several processes cannot do.

    Raises:
        cli.UsageError: names the flag and a way on.
    """
    from train_options import check_devices

    if args.amp == "fp16" and device == "cpu":
        raise cli.UsageError("--amp fp16 needs a GPU; use --amp bf16 or no on the cpu")
    check_devices(args, device, processes)
    if args.batch < 2 * processes.world:
        raise cli.UsageError(
            f"-b {args.batch} leaves a process a single image or none, and statistics and comparisons need two; give "
            f"-b {16 * processes.world} or more, {2 * processes.world} at least"
        )


def idle_flags(args: argparse.Namespace, parser: argparse.ArgumentParser) -> list[str]:
    """A line for each group of flags that were given and change nothing, for want of another one.

    Args:
        args: after check_flags. parser: knows the defaults.
    """
    from train_options import long_warmup

    method = args.method
    partners = {
        "--method barlow or dense": (method in ("barlow", "dense"), ["lambda_"]),
        "--method moco or mocov3": (method in ("moco", "mocov3"), ["temperature", "momentum_encoder"]),
        "--method moco": (method == "moco", ["queue"]),
        "--method dense": (method == "dense", ["dense_points", "dense_global"]),
        "--method mae": (method == "mae", ["mask_share"]),
        "--method barlow, dense, moco or mocov3": (method != "mae", ["projector"]),
        "--optim SGD or LARS": (args.optim in ("SGD", "LARS"), ["momentum"]),
        "--probe DIR": (args.probe, ["probe_head"]),
    }
    return cli.without_partners(args, parser, partners) + long_warmup(args)


def scaled_rate(args: argparse.Namespace) -> float:
    """The highest learning rate, for the images of one step of all processes together."""
    return float(args.lr * args.batch * args.accumulate / BASE_BATCH)


def fit_options(args: argparse.Namespace) -> Any:
    """Flags about optimisation as the learner takes them."""
    from learner import FitOptions
    from optim import ScheduleOptions

    return FitOptions(
        epochs=args.epochs,
        lr=scaled_rate(args),
        optimiser=args.optim,
        weight_decay=args.weight_decay,
        momentum=args.momentum,
        schedule=ScheduleOptions("cosine", args.warmup),
        amp=args.amp,
        accumulate=args.accumulate,
        clip=args.clip,
        monitor="loss",
        channels_last=args.channels_last,
    )


def method_options(args: argparse.Namespace, windows: int) -> Any:
    """Flags about the method as build_method takes them.

    Args:
        windows: pairs of views in an epoch.
    """
    from selfsupervised.interface import MethodOptions
    from selfsupervised.moco import choose_queue

    return MethodOptions(
        projector=args.projector,
        lambda_=args.lambda_,
        temperature=args.temperature,
        momentum=args.momentum_encoder,
        queue=args.queue or choose_queue(windows, args.batch),
        points=args.dense_points,
        global_weight=args.dense_global,
        mask_share=args.mask_share,
        batch=args.batch,
        side=side(args),
    )
