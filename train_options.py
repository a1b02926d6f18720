"""Flags of train.py about network, samples and optimisation: declared, checked, and as the modules take them."""

import argparse
from pathlib import Path
from typing import Any

import cli


def add_network_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags about the network."""
    group = parser.add_argument_group("network")
    group.add_argument("-m", "--model", default="deeplabv3+", metavar="NAME", help="architecture of smp, or plain-unet")
    group.add_argument("--encoder", default="efficientnet-b0", metavar="NAME", help="encoder of smp or timm")
    group.add_argument(
        "--encoder-weights",
        default="imagenet",
        metavar="W",
        help="imagenet (downloaded), none, or a file of weights; plain-unet has none of imagenet",
    )
    group.add_argument("--init-from", type=Path, metavar="CKPT", help="start from the whole network of a checkpoint")


def add_sample_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags about samples."""
    group = parser.add_argument_group("samples")
    group.add_argument(
        "--image-size", type=cli.positive_int, nargs="+", default=[512], metavar="S", help="side, or height and width"
    )
    group.add_argument(
        "--crops",
        type=cli.natural,
        default=0,
        metavar="N",
        help="take N random crops of --image-size from each image at native scale; 0: resize the whole image to it",
    )
    group.add_argument(
        "--foreground-quota",
        type=cli.share,
        default=0.33,
        metavar="X",
        help="share of crops that hold a labelled pixel",
    )
    group.add_argument(
        "-a", "--augmentation", default="hard", metavar="PRESET", help="safe light medium hard one none vessel"
    )


def add_optimisation_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags about loss, optimiser and schedule."""
    group = parser.add_argument_group("optimisation")
    group.add_argument(
        "-e", "--epochs", type=cli.positive_int, default=50, metavar="N", help="epochs in all, also on resume"
    )
    group.add_argument("-lr", "--lr", type=cli.positive_float, default=1e-3, metavar="X", help="highest learning rate")
    group.add_argument("--loss", default="DiceLoss", metavar="SUM", help='a loss or a sum such as "0.3*ce+0.7*dice"')
    group.add_argument(
        "--class-weights", nargs="+", metavar="W", help="a number per class, or auto from the label counts"
    )
    group.add_argument("--optim", default="AdamW", metavar="NAME", help="AdamW, Adam or SGD")
    group.add_argument(
        "--weight-decay", type=cli.not_negative, default=1e-4, metavar="X", help="decay of weights, not of biases"
    )
    group.add_argument("--momentum", type=cli.share, default=0.9, metavar="X", help="momentum of SGD")
    group.add_argument(
        "-sc", "--scheduler", default="cosine", metavar="NAME", help="cosine, plateau, one-cycle or constant"
    )
    group.add_argument("--warmup", type=cli.not_negative, default=0, metavar="N", help="epochs of rising rate; 0: none")
    group.add_argument("--plateau-factor", type=cli.share, default=0.1, metavar="X", help="what plateau multiplies by")
    group.add_argument("--plateau-patience", type=cli.natural, default=10, metavar="N", help="epochs it waits")
    group.add_argument(
        "--plateau-cooldown", type=cli.natural, default=0, metavar="N", help="epochs it rests after that"
    )
    group.add_argument("--amp", choices=("no", "bf16", "fp16"), default="no", help="precision inside autocast")
    group.add_argument("--accumulate", type=cli.positive_int, default=1, metavar="N", help="batches for one step")
    group.add_argument(
        "--clip", type=cli.not_negative, default=0, metavar="X", help="largest gradient norm; 0: no limit"
    )
    group.add_argument(
        "--channels-last", action=argparse.BooleanOptionalAction, default=True, help="memory layout of tensors"
    )
    group.add_argument(
        "--early-stop", type=cli.natural, default=0, metavar="N", help="end after N epochs without a best; 0: never"
    )
    group.add_argument("--monitor", choices=("iou", "dice", "loss"), default="iou", help="what decides which is best")


def network_names(args: argparse.Namespace) -> tuple[str, str]:
    """Our spelling of -m and --encoder, so that two spellings of one network are the same run."""
    from model import resolve_architecture, resolve_encoder

    architecture = resolve_architecture(args.model)
    return architecture, resolve_encoder(args.encoder, architecture)


def check_flags(args: argparse.Namespace) -> None:
    """Refuse unknown names and numbers that cannot be, before any file of the data set is read.

    Raises:
        cli.UsageError: names the flag or what it may be.
    """
    import torch

    import augmentations
    import losses
    import model
    import optim

    if (args.mpp or args.reduce) and not args.crops:
        raise cli.UsageError("--mpp and --reduce are for networks trained on crops; give --crops N too")
    if args.reduce and args.reduce < 1:
        raise cli.UsageError(f"--reduce {args.reduce:g} would enlarge the images; expected 1 or more")
    if len(args.image_size) > 2:
        raise cli.UsageError(f"--image-size takes one number or two, found {len(args.image_size)}")
    if args.plateau_factor >= 1:
        raise cli.UsageError(f"--plateau-factor {args.plateau_factor:g} does not lower anything; expected less than 1")
    for flag, path in (("--init-from", args.init_from), ("--encoder-weights", weights_file(args))):
        if path and not path.is_file():
            raise cli.UsageError(f"{flag} {path}: no such file")
    class_weights(args)
    try:
        losses.build_loss(args.loss, num_logits=2)
        augmentations.Augmentation(args.augmentation, rgb=True, value_range=(0, 255))
        optim.check_names(args.optim, args.scheduler)
        with torch.device("meta"):
            model.build_model(args.model, args.encoder, in_channels=3, num_logits=1)
    except ValueError as error:
        raise cli.UsageError(str(error)) from error


def weights_file(args: argparse.Namespace) -> Path | None:
    """The file that --encoder-weights names, if it names one; a word without a suffix names published weights."""
    path = Path(args.encoder_weights)
    return path if path.suffix or len(path.parts) > 1 or path.exists() else None


def class_weights(args: argparse.Namespace) -> list[float] | None:
    """The numbers of --class-weights, None for auto and without the flag."""
    if args.class_weights in (None, ["auto"]):
        return None
    try:
        return [float(word) for word in args.class_weights]
    except ValueError:
        found = " ".join(args.class_weights)
        raise cli.UsageError(f"--class-weights {found!r}: expected a number for each class, or auto") from None


def fit_options(args: argparse.Namespace) -> Any:
    """Flags about optimisation as the trainer takes them."""
    from learner import FitOptions
    from optim import ScheduleOptions

    schedule = ScheduleOptions(
        args.scheduler, args.warmup, args.plateau_factor, args.plateau_patience, args.plateau_cooldown
    )
    return FitOptions(
        epochs=args.epochs,
        lr=args.lr,
        optimiser=args.optim,
        weight_decay=args.weight_decay,
        momentum=args.momentum,
        schedule=schedule,
        amp=args.amp,
        accumulate=args.accumulate,
        clip=args.clip,
        patience=args.early_stop,
        monitor=args.monitor,
        channels_last=args.channels_last,
        keep_worst=args.worst,
        empty=args.empty,
    )
