"""Flags of train.py about network, samples and optimisation: declared, checked, and as the modules take them."""

import argparse
from pathlib import Path
from typing import Any

import cli

MAX_STRIDE = 64  # of networks that take any multiple of it; more is the one size that a fixed network takes


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
    group.add_argument(
        "--init",
        choices=("network", "kaiming", "xavier"),
        default="network",
        help="random start of the decoder where no weights are loaded; network: as its authors have it",
    )


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
        "-a",
        "--augmentation",
        default="hard",
        metavar="PRESET",
        help="none safe light medium hard one vessel histology aerial",
    )
    cli.add_switch(group, "--ignore-holes", help="do not score what augmentation blacks out; else it keeps its class")
    group.add_argument(
        "--mix",
        choices=("mosaic", "cutmix", "copy-paste"),
        help="make samples of several; copy-paste: paste objects",
    )
    group.add_argument(
        "--mix-share", type=cli.share, default=0.5, metavar="X", help="share of the samples that --mix mixes"
    )
    group.add_argument(
        "--dump-augmented",
        type=cli.natural,
        default=0,
        metavar="N",
        help="write sheets of N samples to augmented/ in the run folder, one for each step of the preset",
    )


def add_optimisation_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags about loss, optimiser and what a step is."""
    group = parser.add_argument_group("optimisation")
    group.add_argument(
        "-e", "--epochs", type=cli.positive_int, default=50, metavar="N", help="epochs in all, also on resume"
    )
    group.add_argument("-lr", "--lr", type=cli.positive_float, default=1e-3, metavar="X", help="highest learning rate")
    group.add_argument("--loss", default="DiceLoss", metavar="SUM", help='a loss or a sum such as "0.3*ce+0.7*dice"')
    group.add_argument(
        "--class-weights", nargs="+", metavar="W", help="a number per class, or auto from the label counts"
    )
    group.add_argument(
        "--label-smoothing",
        type=cli.share,
        default=0,
        metavar="X",
        help="share of the truth that ce and bce spread",
    )
    group.add_argument(
        "--optim",
        default="AdamW",
        metavar="NAME",
        help="AdamW Adam SGD NAdam RAdam Adamax Adadelta Adagrad ASGD RMSprop Rprop LARS",
    )
    group.add_argument(
        "--weight-decay", type=cli.not_negative, default=1e-4, metavar="X", help="decay of weights, not of biases"
    )
    group.add_argument(
        "--momentum", type=cli.share, default=0.9, metavar="X", help="momentum of SGD (Nesterov's) and LARS"
    )
    group.add_argument(
        "--encoder-lr-scale",
        type=cli.positive_float,
        default=1.0,
        metavar="X",
        help="times -lr is the encoder's rate, such as 0.1 for pretrained ones",
    )
    group.add_argument(
        "--freeze-encoder", type=cli.natural, default=0, metavar="N", help="first epochs in which it does not learn"
    )
    group.add_argument(
        "--ema",
        type=cli.inner_share,
        metavar="DECAY",
        help="score and keep a moving average of the weights, such as 0.999",
    )
    group.add_argument("--amp", choices=("no", "bf16", "fp16"), default="no", help="precision inside autocast")
    cli.add_switch(group, "--sync-bn", help="batch normalisation over the batches of all processes")
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


def add_schedule_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags about the learning rate over a run, and the search for it."""
    group = parser.add_argument_group("schedule")
    group.add_argument(
        "-sc",
        "--scheduler",
        default="cosine",
        metavar="NAME",
        help="cosine, plateau, one-cycle, poly, step or constant",
    )
    group.add_argument("--warmup", type=cli.not_negative, default=0, metavar="N", help="epochs of rising rate; 0: none")
    group.add_argument("--plateau-factor", type=cli.share, default=0.1, metavar="X", help="what plateau multiplies by")
    group.add_argument("--plateau-patience", type=cli.natural, default=10, metavar="N", help="epochs it waits")
    group.add_argument(
        "--plateau-cooldown", type=cli.natural, default=0, metavar="N", help="epochs it rests after that"
    )
    group.add_argument("--poly-power", type=cli.positive_float, default=0.9, metavar="X", help="bend of poly; 1: line")
    group.add_argument("--step-every", type=cli.positive_int, default=10, metavar="N", help="epochs of a step")
    group.add_argument("--step-factor", type=cli.share, default=0.1, metavar="X", help="what step multiplies by")
    group.add_argument(
        "--lr-find",
        type=cli.positive_int,
        nargs="?",
        const=100,
        metavar="N",
        help="only look for -lr: N steps (100) with rising rates, a plot in the run folder, nothing is trained",
    )


def add_validation_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags about validation sets beside the main one."""
    group = parser.add_argument_group("validation sets")
    group.add_argument(
        "--add-val-dirs",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="further validation sets, split folders or roots; or a .txt file with one in each line",
    )
    group.add_argument(
        "--adv-freq", type=cli.positive_int, default=1, metavar="N", help="score them every N epochs and in the last"
    )
    cli.add_switch(group, "--use-only-add-val", help="no main set: their mean, weighted by numbers of images, decides")


def add_fold_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags about cross-validation."""
    group = parser.add_argument_group("folds")
    group.add_argument(
        "--folds",
        type=cli.positive_int,
        metavar="K",
        help="cross-validation: hold each K-th part of the training images out once, by --group-pattern",
    )
    group.add_argument(
        "--fold", type=fold_number, default="all", metavar="K", help="train this one alone, counted from 0, or all"
    )


def fold_number(text: str) -> str:
    """Argparse type: a whole number of at least 0, or the word all."""
    return text if text == "all" else str(cli.natural(text))


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
    for flag, factor in (("--plateau-factor", args.plateau_factor), ("--step-factor", args.step_factor)):
        if not 0 < factor < 1:
            does = "would end all learning" if factor == 0 else "does not lower anything"
            raise cli.UsageError(f"{flag} {factor:g} {does}; expected more than 0 and less than 1")
    check_validation_flags(args)
    check_fold_flags(args)
    check_search_flags(args)
    for flag, path in (("--init-from", args.init_from), ("--encoder-weights", weights_file(args))):
        if path and not path.is_file():
            raise cli.UsageError(f"{flag} {path}: no such file")
    class_weights(args)
    some = torch.ones(2) if args.class_weights else None  # their number is not known before the classes are
    try:
        losses.build_loss(args.loss, num_logits=2, class_weights=some, label_smoothing=args.label_smoothing)
        augmentations.Augmentation(args.augmentation, rgb=True, value_range=(0, 255))
        args.optim, args.scheduler = optim.resolve_optimiser(args.optim), optim.resolve_schedule(args.scheduler)
        model.build_outline(args.model, args.encoder)
    except ValueError as error:
        raise cli.UsageError(str(error)) from error


def idle_flags(args: argparse.Namespace, parser: argparse.ArgumentParser) -> list[str]:
    """A line for each group of flags that were given and change nothing, for want of another one.

    Args:
        args: after check_flags. parser: knows the defaults.
    """
    partners = {
        "--mix": (args.mix, ["mix_share"]),
        "--crops N": (args.crops, ["foreground_quota"]),
        "-sc plateau": (args.scheduler == "plateau", ["plateau_factor", "plateau_patience", "plateau_cooldown"]),
        "-sc poly": (args.scheduler == "poly", ["poly_power"]),
        "-sc step": (args.scheduler == "step", ["step_every", "step_factor"]),
        "--optim SGD or LARS": (args.optim in ("SGD", "LARS"), ["momentum"]),
        "--add-val-dirs DIR": (args.add_val_dirs, ["adv_freq"]),
    }
    lines = cli.without_partners(args, parser, partners)
    begun = ["--init"] if args.init != "network" else []
    begun += ["--encoder-weights"] if args.encoder_weights.lower() not in ("imagenet", "none") else []
    if args.init_from and begun:
        named = " ".join(begun)
        lines.append(f"warning: --init-from starts from a whole network, so nothing is done with {named}")
    return lines + thwarted_flags(args)


def long_warmup(args: argparse.Namespace) -> list[str]:
    """A line when the rate rises for the whole run; else none."""
    if args.warmup < args.epochs:
        return []
    return [f"warning: --warmup {args.warmup:g} takes all of --epochs {args.epochs}, so the rate never comes to -lr"]


def thwarted_flags(args: argparse.Namespace) -> list[str]:
    """A line for each flag that others keep from what it is for."""
    import augmentations

    lines = long_warmup(args)
    random = args.encoder_weights.lower() == "none" or (args.model == "plain-unet" and weights_file(args) is None)
    if args.freeze_encoder and random and not args.init_from:
        lines.append("warning: --freeze-encoder keeps random weights as they are, as --encoder-weights loads none")
    steps = [step for chance in augmentations.LOCAL[args.augmentation] for step in chance.steps]
    if args.ignore_holes and augmentations.HOLES not in steps:
        lines.append(f"warning: -a {args.augmentation} makes no holes, so nothing is done with --ignore-holes")
    return lines


def check_devices(args: argparse.Namespace, device: str, processes: Any) -> None:
    """Refuse --sync-bn of one process, and several where each cannot have a device.

    Raises:
        cli.UsageError: names the flag and a way on.
    """
    import torch

    if processes.world == 1:
        if args.sync_bn:
            raise cli.UsageError("--sync-bn joins the batches of several processes; start them with torchrun")
        return
    if device not in ("cpu", "cuda"):
        raise cli.UsageError(f"--device {device}: each process takes a GPU of its own with --device cuda, or the cpu")
    if device == "cuda" and torch.cuda.device_count() < processes.on_machine:
        raise cli.UsageError(
            f"{processes.on_machine} processes on a machine with {torch.cuda.device_count()} GPUs, and each needs one; "
            "lower --nproc_per_node of torchrun, or give --cpu"
        )


def check_processes(args: argparse.Namespace, device: str, processes: Any) -> None:
    """Refuse what several processes cannot do, and what only several can.

    Raises:
        cli.UsageError: names the flag and a way on.
    """
    check_devices(args, device, processes)
    if processes.world == 1:
        return
    if args.lr_find or args.batch == "auto":
        flag = "--lr-find" if args.lr_find else "-b auto"
        raise cli.UsageError(f"{flag} tries what one process can do; start it without torchrun")
    if args.batch < processes.world:
        raise cli.UsageError(
            f"-b {args.batch} is the batch of all {processes.world} processes together, so some would have nothing to "
            f"learn from; give -b {processes.world} or more, or start fewer processes"
        )


def check_validation_flags(args: argparse.Namespace) -> None:
    """Refuse combinations of validation sets that would score nothing.

    Raises:
        cli.UsageError: names the flags.
    """
    if args.use_only_add_val and not args.add_val_dirs:
        raise cli.UsageError("--use-only-add-val leaves no validation set; give --add-val-dirs DIR too")
    if args.use_only_add_val and (args.val_dir or args.val_ids):
        flag = "--val-dir" if args.val_dir else "--val-ids"
        raise cli.UsageError(f"{flag} names a main validation set and --use-only-add-val wants none; leave one out")
    if args.use_only_add_val and 0 < args.early_stop < args.adv_freq:
        raise cli.UsageError(
            f"--early-stop {args.early_stop} would end the run between two scorings, which --adv-freq {args.adv_freq} "
            f"sets apart; give --early-stop {args.adv_freq} or more"
        )


def check_fold_flags(args: argparse.Namespace) -> None:
    """Refuse folds that cannot be, and a validation set beside them.

    Raises:
        cli.UsageError: names the flags.
    """
    if args.folds is None:
        if args.fold != "all":
            raise cli.UsageError(f"--fold {args.fold} of how many? Give --folds K too")
        return
    if args.folds < 2:
        raise cli.UsageError(f"--folds {args.folds} leaves nothing to train on; expected 2 or more")
    if args.fold != "all" and int(args.fold) >= args.folds:
        raise cli.UsageError(f"--fold {args.fold}: {args.folds} folds are counted from 0 to {args.folds - 1}")
    others = {"--val-dir": args.val_dir, "--val-ids": args.val_ids, "--use-only-add-val": args.use_only_add_val}
    for flag, given in others.items():
        if given:
            raise cli.UsageError(f"{flag} and --folds: each fold is validated on what it holds out; leave one away")


def check_search_flags(args: argparse.Namespace) -> None:
    """Refuse a search for the learning rate that would find none.

    Raises:
        cli.UsageError: names the flags.
    """
    if args.lr_find is None:
        return
    if args.lr_find < 10:
        raise cli.UsageError(f"--lr-find {args.lr_find}: expected 10 steps or more, such as 100")
    if args.optim.lower() == "rprop":
        raise cli.UsageError("--lr-find has no use for Rprop, which chooses the size of its steps itself")
    if args.folds and args.fold == "all":
        raise cli.UsageError("--lr-find looks at one training; give --fold 0 too")


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
        args.scheduler,
        args.warmup,
        args.plateau_factor,
        args.plateau_patience,
        args.plateau_cooldown,
        args.poly_power,
        args.step_every,
        args.step_factor,
    )
    return FitOptions(
        epochs=args.epochs,
        lr=args.lr,
        optimiser=args.optim,
        weight_decay=args.weight_decay,
        momentum=args.momentum,
        encoder_lr_scale=args.encoder_lr_scale,
        freeze_encoder=args.freeze_encoder,
        ema=args.ema or 0.0,
        schedule=schedule,
        amp=args.amp,
        accumulate=args.accumulate,
        clip=args.clip,
        patience=args.early_stop,
        monitor=args.monitor,
        channels_last=args.channels_last,
        keep_worst=args.worst,
        empty=args.empty,
        further_every=args.adv_freq,
        weighted=args.use_only_add_val,
    )


def build_config(args: argparse.Namespace, data: Any, stride: int, min_side: int) -> Any:
    """Describe the network and how pixels meet it.

    Raises:
        ValueError: a size that the network cannot take.
    """
    from checkpoint import Geometry, ModelConfig

    size = (args.image_size[0], args.image_size[-1])
    for side in size:
        if side % stride or side < min_side:
            fit = max(-(-min_side // stride), round(side / stride)) * stride
            raise ValueError(
                f"--image-size {side}: {args.model} takes multiples of {stride} from {min_side} on; try {fit}"
            )
    if args.crops and stride > MAX_STRIDE:
        raise ValueError(f"{args.encoder} takes images of {stride}x{stride} only: leave --crops out, or take another")
    if args.crops:
        tile = max(min(1024, 4 * max(size)), *size)
        scale = {"reduction": data.slides.reduction, "mpp": data.slides.mpp}
        geometry = Geometry("crops", size, tile=tile, overlap=tile // 4, halo=tile // 16, **scale)
    else:
        geometry = Geometry("resize", size)
    return ModelConfig(
        architecture=args.model,
        encoder=args.encoder,
        labels=data.classes.labels,
        class_names=data.classes.names,
        channels=data.channels,
        mean=data.statistics.mean,
        std=data.statistics.std,
        geometry=geometry,
        ignore_label=args.ignore_label,
        mask_threshold=args.mask_threshold,
        max_mask_val=args.max_mask_val,
        add_dirs=tuple(args.add_dirs),
        roi_dir=args.roi_dir,
        preprocess=tuple(args.preprocess),
        dtype=data.dtype,
        value_range=data.statistics.value_range,
        image_means=data.statistics.image_means,
        stride=stride,
        min_side=min_side,
        batch=args.batch,
        val_share=0.0 if args.folds or args.use_only_add_val else args.val_share,
        group_pattern=args.group_pattern,
        tissue=data.slides.tissue,
    )
