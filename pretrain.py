"""Pretrain an encoder on unlabelled images, so that train.py needs fewer labels.

Examples:
    python pretrain.py --images data/unlabelled --views microscopy --encoder resnet18 -e 200
    python train.py -d data/sample -m unet --encoder resnet18 --encoder-weights logs/NAME/NAME.pth
"""

import argparse
import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cli
import pretrain_options as options

WINDOWS, WINDOW_BYTES = 256, 64 << 20  # most windows that are watched, and the memory that they may take
FEW_BATCHES = 20  # in an epoch
QUIET = {"images", "epochs", "workers", "log_dir", "exp_name", "cpu", "device", "encoder_weights"}
QUIET |= {"probe", "probe_every", "probe_head", "allow_collapse"}
QUIET |= {"class_list", "class_names", "ignore_label", "mask_threshold", "max_mask_val"}


def build_parser() -> argparse.ArgumentParser:
    """Flags of pretrain.py."""
    parser = cli.make_parser("Pretrain an encoder on unlabelled images, so that train.py needs fewer labels.")
    options.add_image_args(parser)
    options.add_method_args(parser)
    options.add_optimisation_args(parser)
    options.add_watch_args(parser)
    cli.add_run_args(parser, batch=64)
    cli.add_log_args(parser, tables=False)
    return parser


@dataclass(frozen=True)
class Data:
    """The images of a run after their check."""

    found: Any  # selfsupervised.images.CheckedImages
    statistics: Any  # normalisation.Statistics; None before they are computed
    digest: str
    slides: Any

    def windows(self, args: argparse.Namespace) -> int:
        """Pairs of views in an epoch."""
        return len(self.found.pairs) * int(args.crops)

    @property
    def dtype(self) -> str:
        """Type of the pixels."""
        return str(self.found.facts[0].layers[0].dtype)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, check the images, pretrain, say where the encoder is."""
    parser = build_parser()
    with cli.said_once():
        args = cli.parse(parser, argv)
    with cli.plain_errors(parser, interrupted="the same command goes on from the last finished epoch"):
        from processes import join_processes

        device = cli.pick_device(args.device, args.cpu)
        with join_processes(device) as processes:
            args = processes.first_does(lambda: check_command(args, device, processes))
            run_dir = args.log_dir / (args.exp_name or default_name(args))
            data = processes.first_does(lambda: prepare_run(args, run_dir))
            pretrain(args, data, run_dir, device, cli.run_record(args, argv), processes)


def check_command(args: argparse.Namespace, device: str, processes: Any) -> argparse.Namespace:
    """The flags in our spelling, after their check."""
    options.check_flags(args)
    options.check_processes(args, device, processes)
    print(f"device: {device}{processes.described}")
    for line in options.idle_flags(args, build_parser()):
        print(line)
    return args


def default_name(args: argparse.Namespace) -> str:
    """Name of a run that was given none; the same command finds the same run again."""
    folder = Path(args.images[0]).resolve()
    while folder.parent != folder and not folder.is_dir():
        folder = folder.parent  # of a file or a glob
    words = [folder.name]
    while words[0] in ("images", "train") and folder.parent != folder:
        folder = folder.parent
        words.insert(0, folder.name)
    return f"{args.method}_{args.encoder}_{'_'.join(words)}".replace("/", "-")


def prepare_run(args: argparse.Namespace, run_dir: Path) -> Data:
    """The images of a run whose folder it can go on in."""
    from run_folder import read_history

    epochs = len(read_history(run_dir))
    if epochs > 1 and not (run_dir / "last_checkpoint").is_file():
        raise ValueError(
            f"{run_dir} holds a run of {epochs} epochs and no last_checkpoint to go on from. Put it back, or use "
            "another --exp-name."
        )
    return prepare_data(args, run_dir)


def prepare_data(args: argparse.Namespace, run_dir: Path) -> Data:
    """Find and check the images, say what was found, list those that cannot be read."""
    import normalisation
    from image_io import write_text
    from selfsupervised.images import check_images, find_images
    from selfsupervised.pretrainer import read_state
    from slide_scan import choose_tissue
    from slide_windows import SlideOptions
    from tables import format_csv

    pairs = find_images(options.image_words(args), args.add_dirs)
    slides, said = choose_tissue(pairs, SlideOptions(args.mpp or 0.0, args.reduce or 1.0), args.tissue)
    found = check_images(pairs, add_dirs=args.add_dirs, steps=args.preprocess, slides=slides, progress=True)
    if found.left_out:
        path = run_dir / "unreadable.csv"
        rows = [{"file": str(file), "reason": reason} for file, reason in found.left_out]
        write_text(path, format_csv(("file", "reason"), rows, "dot"))
        for row in rows[:5]:
            print(f"warning: left out: {row['reason']}")
        print(
            f"warning: {len(rows)} of {len(pairs)} files are left out and stay as they are; they are listed in {path}"
        )
    for message in found.warnings:
        print(f"warning: {message}")
    digest = normalisation.digest(found.facts, args.preprocess)
    # Before anything is written into the folder of a run that this one cannot go on in.
    read_state(run_dir / "last_checkpoint", describe(args, Data(found, None, digest, slides)))
    statistics = normalisation.load_or_compute_statistics(run_dir, run_dir, found.facts, args.preprocess)
    notes = "".join(f"; {text}" for text in (*found.notes, said) if text)
    print(f"{len(found.pairs)} images of {len(found.channels)} channels ({', '.join(found.channels)}){notes}")
    print(f"statistics: {statistics.source}")
    return Data(found, statistics, digest, slides)


def build_views(args: argparse.Namespace, data: Data, preset: str) -> Any:
    """The images as pairs of views."""
    from selfsupervised.images import UnlabelledSet, usual_range
    from selfsupervised.views import ViewMaker, ViewOptions

    # Masked autoencoding guesses pixels: noise that was added could not be guessed, and hardly needs other changes.
    shape = ViewOptions(options.side(args), args.window, args.views_from, values=args.method != "mae")
    maker = ViewMaker(preset, shape, rgb=data.found.rgb, value_range=usual_range(data.statistics))
    mean, std = data.statistics.mean, data.statistics.std
    return UnlabelledSet(
        data.found.pairs, maker, data.found.channels, mean, std, steps=args.preprocess, slides=data.slides
    )


def build_batches(args: argparse.Namespace, data: Data, device: str, processes: Any) -> Any:
    """The views as batches; of several processes, this one's part of them."""
    from selfsupervised.images import ViewBatches
    from selfsupervised.views import auto_views

    preset = auto_views(data.found.channels) if args.views == "auto" else args.views
    batches = ViewBatches(
        build_views(args, data, preset),
        batch=args.batch,
        crops=args.crops,
        seed=args.seed,
        workers=processes.workers(args.workers),
        pin=device.startswith("cuda"),
        rank=processes.rank,
        world=processes.world,
    )
    pairs = f"{len(data.found.pairs) * args.crops} pairs an epoch, {len(batches)} batches of {args.batch}"
    kept = ", values as they are" if args.method == "mae" else ""
    print(f"views: {preset}{kept}, {options.side(args)} pixels; {pairs}")
    if len(batches) < FEW_BATCHES:
        more = math.ceil(FEW_BATCHES * args.batch / len(data.found.pairs))
        print(
            f"an epoch of fewer than {FEW_BATCHES} batches is short for the schedule; --crops {more} makes it so long"
        )
    return batches


def plain_windows(args: argparse.Namespace, data: Data) -> tuple[Any, list[str]]:
    """Windows as they are, the same in every run: for statistics, what is watched, and pictures; names of images."""
    import torch

    from dataset import Slot

    views = build_views(args, data, "none")
    count = min(WINDOWS, max(16, WINDOW_BYTES // (views.sample_bytes // 2)))
    each = max(1, min(count // len(views), args.crops, count))
    step = max(1, len(views) * each // count)
    images = range(0, len(views), step)
    items = [views[tuple(Slot(image, image * each + number) for number in range(each))] for image in images]
    samples = [sample for item in items for sample in item][:count]
    return torch.stack([torch.from_numpy(view) for _, view, _, _ in samples]), [name for name, *_ in samples]


def build_encoder(args: argparse.Namespace, channels: int) -> Any:
    """The encoder with its starting weights, checked on a view."""
    import torch

    from model import BUILD_ERRORS, shorten_error
    from selfsupervised.encoders import build_encoder as random_encoder
    from selfsupervised.encoders import feature_maps

    encoder = random_encoder(args.encoder, channels)
    try:
        with torch.no_grad():
            feature_maps(encoder.eval(), torch.zeros(1, channels, options.side(args), options.side(args)))
    except BUILD_ERRORS as error:
        patch = getattr(getattr(getattr(encoder, "model", None), "patch_embed", None), "patch_size", None)
        whole = f"{patch[0]}, the side of its patches" if patch else "32"
        raise cli.UsageError(
            f"--image-size {options.side(args)}: {args.encoder} does not take it ({shorten_error(error)}); expected a "
            f"multiple of {whole}, or the one size that a vision transformer was made for, such as 224"
        ) from error
    return encoder.train()


def architecture_for(encoder: str) -> str:
    """An architecture of train.py that takes an encoder: plain-unet, unet, or what else there is."""
    import model
    from selfsupervised.encoders import HOLDERS

    if encoder.startswith("plain-"):
        return model.PLAIN_UNET
    for architecture in HOLDERS[:-1]:
        try:
            model.build_outline(architecture, encoder)
        except ValueError:
            continue
        return architecture
    return HOLDERS[-1]


def start_weights(args: argparse.Namespace, encoder: Any, channels: int) -> None:
    """Put the weights of --encoder-weights into the encoder, and say what matched."""
    import model
    import weights

    name = architecture_for(args.encoder)
    network: Any = model.build_model(name, args.encoder, in_channels=channels, num_logits=1)
    print(weights.load_encoder_weights(network, args.encoder_weights, in_channels=channels))
    encoder.load_state_dict(network.encoder.state_dict())


def build_method(args: argparse.Namespace, channels: int, windows: int, *, fresh: bool) -> Any:
    """The method around an encoder, with its starting weights if the run is fresh."""
    import torch

    import model
    from gathering import gather_statistics
    from selfsupervised import methods

    torch.manual_seed(args.seed)
    encoder = build_encoder(args, channels)
    if fresh and args.encoder_weights.lower() != "none":
        start_weights(args, encoder, channels)
    if args.sync_bn:
        gather_statistics(encoder)
    try:
        method = methods.build_method(args.method, encoder, options.method_options(args, windows))
    except ValueError as error:
        raise cli.UsageError(str(error)) from error
    if args.accumulate > 1 and not method.accumulates:
        raise cli.UsageError(f"--accumulate {args.accumulate}: {method.why_not}")
    for message in methods.hints(args.method, options.method_options(args, windows), windows):
        print(f"warning: {message}")
    learned = model.count_parameters(encoder) / 1e6, model.count_parameters(method) / 1e6
    queue = f"; a queue of {options.method_options(args, windows).queue} keys" if args.method == "moco" else ""
    whole = f"{learned[1]:.2f} M with all of the method{queue}"
    print(f"{args.method}: {args.encoder} of {learned[0]:.2f} M parameters, {whole}")
    return method


def describe(args: argparse.Namespace, data: Data) -> Any:
    """What is pretrained, on what."""
    from selfsupervised.encoder_file import Description

    sizes = {"--projector": "-".join(map(str, args.projector)) or "default"}
    if args.method == "moco":
        sizes["--queue"] = str(options.method_options(args, data.windows(args)).queue)
    return Description(
        method=args.method,
        encoder=args.encoder,
        channels=tuple(data.found.channels),
        mean=tuple(data.statistics.mean) if data.statistics else (),
        std=tuple(data.statistics.std) if data.statistics else (),
        preprocess=tuple(args.preprocess),
        dtype=data.dtype,
        image_size=options.side(args),
        images=len(data.found.pairs),
        digest=data.digest,
        reduction=data.slides.reduction,
        mpp=data.slides.mpp,
        sizes=sizes,
    )


def pretrain(
    args: argparse.Namespace, data: Data, run_dir: Path, device: str, record: dict[str, Any], processes: Any
) -> None:
    """Build everything, go on from a last_checkpoint if there is one, fit, say where the encoder is."""
    from selfsupervised import pretrainer
    from weights import encoder_file_differences

    fresh, device = not (run_dir / "last_checkpoint").is_file(), processes.device(device)
    channels, windows = len(data.found.channels), data.windows(args)
    batches = build_batches(args, data, device, processes)
    method = processes.first_then_others(lambda: build_method(args, channels, windows, fresh=fresh))
    look = build_look(args, data, channels, device) if processes.first else None
    description = describe(args, data)
    for message in encoder_file_differences(args.encoder_weights, description, description) if fresh else ():
        print(f"warning: {message}")
    fit = options.fit_options(args)
    steps, shape = -(-len(batches) // args.accumulate), (channels, options.side(args), options.side(args))
    say_untrained(args.method, pretrainer.freeze_idle_weights(method, shape))
    learner = pretrainer.build_pretrainer(method, fit, device=device, steps=steps, processes=processes)
    if pretrainer.resume(learner, run_dir / "last_checkpoint", description):
        print(f"going on in {run_dir} after epoch {learner.progress.epoch}")
    complete = learner.progress.epoch >= args.epochs
    if complete:
        print(f"the run is complete: {learner.progress.epoch} epochs are done and --epochs asks for {args.epochs}")
        print("to train on: a larger --epochs; to train anew: another --exp-name")
    else:
        say_start(args, learner, look, run_dir, record["flags"])
    run = open_log(run_dir, learner.progress.epoch, None if complete else record) if processes.first else None
    pretrainer.fit(learner, description, batches, fit, look, run, allow_collapse=args.allow_collapse, report=print)
    if run is not None:
        finish(args, run)


def say_start(args: argparse.Namespace, learner: Any, look: Any, run_dir: Path, flags: dict[str, Any]) -> None:
    """Say what the epochs to come learn with, and from where they begin."""
    from optim import describe_limit
    from selfsupervised.look import probe_start
    from selfsupervised.pretrainer import show_scores

    if learner.progress.epoch:
        say_changes(run_dir, flags)
    if learner.schedule.limit < 1:
        print(describe_limit(learner.schedule, f"--encoder-weights {run_dir / run_dir.name}.pth"))
    rate, images = options.scaled_rate(args), args.batch * args.accumulate
    print(f"learning rate: {rate:.3g} for steps of {images} images (-lr {args.lr:g} is for {options.BASE_BATCH})")
    if look is not None and look.probes and not learner.progress.step:
        print(f"probe before the first epoch: {'  '.join(show_scores(probe_start(learner.network, look)))}")


def say_untrained(method: str, names: list[str]) -> None:
    """Warn of weights behind finer features alone, such as half of the last stage of an HRNet."""
    if names:
        print(
            f"warning: {len(names)} tensors of the encoder (first {names[0].removeprefix('encoder.')}) have no part in "
            f"the coarsest features, which --method {method} compares, and stay as they began; --method dense compares "
            "features at all scales"
        )


def build_look(args: argparse.Namespace, data: Data, channels: int, device: str) -> Any:
    """What is looked at every few epochs."""
    from selfsupervised.look import Look

    windows, names = plain_windows(args, data)
    encoder = build_encoder(args, channels).to(device)
    return Look(
        encoder, windows, names, every=args.probe_every, probes=build_probes(args, data), pictures=build_pictures(data)
    )


def build_probes(args: argparse.Namespace, data: Data) -> list[Any]:
    """The probe of --probe, as a function of the encoder."""
    if not args.probe:
        return []
    from classes import ClassOptions
    from selfsupervised.probe import Probe, ProbeOptions

    probe = Probe(
        ProbeOptions(
            root=args.probe,
            channels=tuple(data.found.channels),
            mean=tuple(data.statistics.mean),
            std=tuple(data.statistics.std),
            preprocess=tuple(args.preprocess),
            dtype=data.dtype,
            side=options.side(args),
            classes=ClassOptions(
                args.class_list,
                tuple(args.class_names or ()),
                args.ignore_label,
                args.mask_threshold,
                args.max_mask_val,
            ),
            head=args.probe_head,
            slides=data.slides,
            tissue=args.tissue,
            seed=args.seed,
            add_dirs=tuple(args.add_dirs),
        )
    )
    learned = {pair.image.resolve() for pair in data.found.pairs}
    known = [path for path in probe.held_out if path.resolve() in learned]
    if known:
        probe.warnings.append(
            f"{len(known)} of the {len(probe.held_out)} images that are validated on are among --images, such as "
            f"{known[0]}: scores say less about new images"
        )
    for message in probe.warnings:
        print(f"warning: --probe: {message}")
    print(f"probe: {'; '.join(probe.notes)}")
    return [probe.score]


def build_pictures(data: Data) -> Any:
    """What draws pictures for TensorBoard."""
    from selfsupervised.pictures import FeaturePictures

    return FeaturePictures(data.statistics.mean, data.statistics.std, dtype=data.dtype)


def open_log(run_dir: Path, epoch: int, record: dict[str, Any] | None) -> Any:
    """The log of a run, cut back to what is done, with the flags of this start; None: it trains nothing."""
    from image_io import write_text
    from selfsupervised.run_log import RunLog

    run = RunLog(run_dir, epoch=epoch)
    if record:
        write_text(run_dir / "args.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        run.log_flags(record["flags"])
    return run


def say_changes(run_dir: Path, flags: dict[str, Any]) -> None:
    """Name the flags that differ from those that the run was started with; its starting weights stay what they were."""
    path = run_dir / "args.json"
    before = json.loads(path.read_text(encoding="utf-8"))["flags"] if path.is_file() else {}
    for name in sorted(flags.keys() & before.keys() - QUIET):
        if flags[name] != before[name]:
            print(f"warning: {name} was {before[name]} when this run began, it goes on with {flags[name]}")
    began = before.get("encoder_weights", flags["encoder_weights"])
    if flags["encoder_weights"] != began:
        print(f"warning: --encoder-weights {flags['encoder_weights']} is for a new run; this one began with {began}")
        flags["encoder_weights"] = began


def finish(args: argparse.Namespace, run: Any) -> None:
    """Say where the encoder is and how it is used."""
    run.close()
    path = run.encoder_path
    if path.is_file():
        name = architecture_for(args.encoder)
        print(f"\nencoder: {path}")
        more = ["--add-dirs", *args.add_dirs] if args.add_dirs else []
        more += ["--preprocess", *args.preprocess] if args.preprocess else []
        more += ["--image-size", str(options.side(args)), *(["--crops", str(args.crops)] if args.window else [])]
        more += ["--class-list", args.class_list] if args.class_list else []
        more += ["--mpp", f"{args.mpp:g}"] if args.mpp else ["--reduce", f"{args.reduce:g}"] if args.reduce else []
        more += ["--exp-name", f"from_{path.stem}"]  # beside a run from scratch
        words = shlex.join(["--encoder", args.encoder, "--encoder-weights", str(path), *more])
        print(f"train with it: python train.py -d DATASET -m {name} {words}")
    print(f"tensorboard --logdir {shlex.quote(str(args.log_dir))}")


if __name__ == "__main__":
    main()
