"""Train a segmentation network on labelled images.

Examples:
    python train.py -d data/sample -m plain-unet --encoder plain-16 -e 20
    python train.py -d slides --mpp 0.5 --crops 200 --image-size 512    (slides with GeoJSON, run lengths or mask TIFFs)
"""

import argparse
import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cli
import model_list
import tracking
from train_options import (
    add_fold_args,
    add_network_args,
    add_optimisation_args,
    add_sample_args,
    add_schedule_args,
    add_validation_args,
    build_config,
    check_flags,
    check_processes,
    class_weights,
    fit_options,
    idle_flags,
    network_names,
)

DEFAULT_BATCH, GPU_BATCH = 6, 16  # the second is what `auto` begins with on a GPU


def build_parser() -> argparse.ArgumentParser:
    """Flags of train.py."""
    parser = cli.make_parser("Train a segmentation network on labelled images.")
    cli.add_recipe_args(parser)
    model_list.add_list_args(parser)
    cli.add_data_args(parser)
    add_network_args(parser)
    add_sample_args(parser)
    add_optimisation_args(parser)
    add_schedule_args(parser)
    add_validation_args(parser)
    add_fold_args(parser)
    cli.add_run_args(parser, batch=DEFAULT_BATCH, auto_batch=True)
    cli.add_score_args(parser)
    cli.add_log_args(parser)
    tracking.add_track_args(parser)
    return parser


@dataclass(frozen=True)
class Data:
    """The data set of a run after its check."""

    train: list[Any]
    val: dict[str, list[Any]]  # by name, the main one first
    classes: Any
    present: list[tuple[int, ...]]
    pixels: Any
    statistics: Any
    channels: tuple[str, ...]
    rgb: bool
    dtype: str
    slides: Any


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, check the data, train, print the score."""
    parser = build_parser()
    with cli.said_once():
        args = cli.parse(parser, argv)
    with cli.plain_errors(parser, interrupted="the same command goes on from the last finished epoch"):
        from processes import join_processes

        device = cli.pick_device(args.device, args.cpu)
        with join_processes(device) as processes:
            args = processes.first_does(lambda: check_command(args, device, processes))
            run_dir = args.log_dir / (args.exp_name or default_name(args))
            if args.folds:
                train_folds(args, argv, run_dir, device, processes)
                return
            data = processes.first_does(lambda: prepare_run(args, run_dir))
            if args.lr_find:
                find_rate(args, data, run_dir, device, processes)
            else:
                train_in_memory(args, argv, data, run_dir, device, processes)


def check_command(args: argparse.Namespace, device: str, processes: Any) -> argparse.Namespace:
    """The flags in our spelling, after their check."""
    check_flags(args)
    tracking.check_installed(args.track)
    args.model, args.encoder = network_names(args)
    check_processes(args, device, processes)
    if args.amp == "fp16" and device == "cpu":
        raise cli.UsageError("--amp fp16 needs a GPU; use --amp bf16 or no on the cpu")
    print(f"device: {device}{processes.described}")
    for line in idle_flags(args, build_parser()):
        print(line)
    return args


def prepare_run(args: argparse.Namespace, run_dir: Path) -> Data:
    """The data set of a run whose folder it can go on in."""
    check_run_folder(run_dir)
    return prepare_data(args, run_dir, check_data(args))


def default_name(args: argparse.Namespace) -> str:
    """Name of a run that was given none; the same command finds the same run again."""
    root = args.dataset.resolve().name
    return f"{args.model}_{args.encoder}_{root}".replace("/", "-").replace("+", "plus")


def check_run_folder(run_dir: Path) -> None:
    """Refuse to start anew, and write over what is there, in the folder of a run whose state is gone.

    A run that was killed in its first epoch has no state yet; that one is started anew.

    Raises:
        ValueError: says how many epochs the folder holds, and how to go on.
    """
    from run_folder import read_history

    epochs = len(read_history(run_dir))
    if epochs > 1 and not (run_dir / "last_checkpoint").is_file():
        raise ValueError(
            f"{run_dir} holds a run of {epochs} epochs and no last_checkpoint to go on from. Put it back, or use "
            f"another --exp-name (--init-from {run_dir / run_dir.name}.pth starts with its best weights)."
        )


def check_data(args: argparse.Namespace) -> Any:
    """Pair, scan and check the files; say what was found."""
    import scan

    checked = scan.check_from_flags(
        args, args.add_val_dirs, main_val=not args.use_only_add_val, folds=args.folds is not None
    )
    for message in checked.warnings:
        print(f"warning: {message}")
    return checked


def prepare_data(args: argparse.Namespace, run_dir: Path, checked: Any) -> Data:
    """What a run needs to know of files that were checked; stop on errors."""
    import normalisation
    import scan
    from slide_index import prepare_slides
    from slide_windows import is_slide

    classes = checked.raise_errors()
    scored = [item for part in checked.val_sets.values() for item in part]
    pairs = [item.pair for item in (*checked.train, *scored) if is_slide(item.pair, checked.slides)]
    if pairs and not args.crops:
        raise cli.UsageError(f"{pairs[0].image} is a slide, which networks see in windows: give --crops N")
    slides = [item.pair for item in checked.train if item.pair in pairs]
    given = (checked.root / normalisation.STATISTICS_FILE).is_file()
    place = run_dir if args.folds and not given else checked.root  # those of one fold are not those of the data set
    statistics = normalisation.load_or_compute_statistics(place, run_dir, checked.train, args.preprocess)
    print(f"{len(checked.train)} training and {len(scored)} validation images; {'; '.join(checked.notes)}")
    print(f"classes: {', '.join(classes.names)}; statistics: {statistics.source}")
    for message in prepare_slides(slides, checked.slides, classes):
        print(f"warning: {message}")
    return Data(
        train=[item.pair for item in checked.train],
        val={name: [item.pair for item in part] for name, part in checked.val_sets.items()},
        classes=classes,
        present=[scan.classes_present(item, classes) for item in checked.train],
        pixels=scan.class_pixels(checked.train, classes),
        statistics=statistics,
        channels=normalisation.channel_names(checked.train, args.add_dirs),
        rgb=checked.train[0].channels == 3,
        dtype=checked.train[0].layers[0].dtype,
        slides=checked.slides,
    )


def build_network(args: argparse.Namespace, data: Data, *, fresh: bool) -> tuple[Any, Any]:
    """The network, with its starting weights if the run is fresh, and the config that describes it."""
    import torch

    import model
    import weights
    from checkpoint import load_checkpoint
    from gathering import gather_statistics
    from networks.single_values import tolerate_single_values

    torch.manual_seed(args.seed)
    num_classes = len(data.classes.names)
    num_logits = 1 if num_classes == 2 and data.classes.has_background else num_classes
    network = model.build_model(args.model, args.encoder, in_channels=len(data.channels), num_logits=num_logits)
    config = build_config(args, data, *model.stride_and_min_side(args.model, args.encoder, network))
    published = args.encoder_weights.lower()
    if fresh and args.init != "network":
        weights.init_decoder(network, args.init)
    if not fresh:
        pass
    elif args.init_from:
        print(weights.init_from(network, load_checkpoint(args.init_from)[1]["model_state_dict"]))
    elif published != "none" and (args.model, published) != ("plain-unet", "imagenet"):
        print(weights.load_encoder_weights(network, args.encoder_weights, in_channels=len(data.channels)))
        for message in weights.encoder_file_differences(args.encoder_weights, config, config.geometry):
            print(f"warning: {message}")
    if args.sync_bn:
        network = gather_statistics(network)
    tolerate_single_values(network)
    print(f"{args.model} {args.encoder}: {model.count_parameters(network) / 1e6:.2f} M parameters")
    return network, config


def build_training_loss(args: argparse.Namespace, config: Any, pixels: Any) -> Any:
    """The loss by its name, with class weights from the flag or from label counts."""
    import torch

    import losses
    import scan

    weights = None
    if args.class_weights == ["auto"]:
        weights = torch.from_numpy(scan.balanced_weights(pixels))
    elif args.class_weights:
        weights = torch.tensor(class_weights(args))
    if weights is not None:
        shown = ", ".join(
            f"{name} {value:.3g}" for name, value in zip(config.class_names, weights.tolist(), strict=False)
        )
        print(f"class weights: {shown}")
    return losses.build_loss(
        args.loss, num_logits=config.num_logits, class_weights=weights, label_smoothing=args.label_smoothing
    )


def build_batches(args: argparse.Namespace, data: Data, config: Any, device: str, processes: Any) -> Any:
    """The training images as augmented batches; of several processes, this one's part of them."""
    from augmentations import Augmentation
    from dataset import EpochSampler, TrainingBatches, TrainingSet
    from mixing import Mixing
    from shared_batches import SharedBatches

    augmentation = Augmentation(
        args.augmentation,
        rgb=data.rgb,
        value_range=data.statistics.value_range,
        ignore_holes=args.ignore_holes,
    )
    mixing = Mixing(args.mix, args.mix_share, data.present, together=args.crops > 0) if args.mix else None
    samples = TrainingSet(data.train, data.classes, config, augmentation, mixing)
    crops, quota = max(1, args.crops), args.foreground_quota if args.crops else 0
    sampler = EpochSampler(data.present, crops=crops, quota=quota, seed=args.seed, slides=samples.slides)
    pin = device.startswith("cuda")
    if processes.world == 1:
        return TrainingBatches(samples, sampler, batch=args.batch, workers=args.workers, pin=pin)
    workers, share = processes.workers(args.workers), {"rank": processes.rank, "world": processes.world}
    return SharedBatches(samples, sampler, batch=args.batch, workers=workers, pin=pin, **share)


def dump_augmented(batches: Any, run_dir: Path, count: int) -> None:
    """Write contact sheets of the first samples of the first epoch."""
    import itertools

    from augmented_sheets import write_sheets

    batches.set_epoch(0)
    slots = [item[0] for item in itertools.islice(batches.sampler, count)]
    paths = write_sheets(run_dir / "augmented", batches.loader.dataset, slots)
    print(f"{len(paths)} sheets of {len(slots)} augmented samples in {run_dir / 'augmented'}")


def train(
    args: argparse.Namespace, data: Data, run_dir: Path, device: str, record: dict[str, Any], processes: Any
) -> None:
    """Build everything, go on from a last_checkpoint if there is one, fit, print the score of the best."""
    import trainer
    from dataset import EvaluationSet
    from learner import build_learner, resume
    from memory import step_lines

    fresh, device = not (run_dir / "last_checkpoint").is_file(), processes.device(device)
    network, config = processes.first_then_others(lambda: build_network(args, data, fresh=fresh))
    loss = build_training_loss(args, config, data.pixels)
    batches, options = build_batches(args, data, config, device, processes), fit_options(args)
    shape = (-(-args.batch // processes.world), len(config.channels), *config.geometry.size)
    steps = -(-len(batches) // args.accumulate)
    learner = build_learner(network, options, device=device, steps=steps, processes=processes, image=shape[1:])
    before = resume(learner, run_dir / "last_checkpoint", config)
    if before:
        print(f"going on in {run_dir} after epoch {learner.progress.epoch}")
        say_changes(run_dir, record["flags"], before, config, named=bool(args.exp_name))
    say_optimisation(learner, args)
    use = {"optimiser": args.optim, "averaged": bool(args.ema), "amp": args.amp != "no"}
    for line in step_lines(learner.network, shape, device, use, workers=args.workers):
        print(line)
    run = open_run(args, run_dir, learner.progress.epoch, list(data.val), record) if processes.first else None
    if args.dump_augmented and run is not None:
        dump_augmented(batches, run_dir, args.dump_augmented)
    val_sets = {name: EvaluationSet(pairs, data.classes, config) for name, pairs in data.val.items()}
    if trainer.is_finished(learner.progress, options):
        early = learner.progress.epoch < args.epochs
        why = "early stopping ended it" if early else f"--epochs asks for {args.epochs}"
        print(f"the run is complete: {learner.progress.epoch} epochs are done and {why}; nothing is trained")
        print("to train on: a larger --epochs; to train anew: another --exp-name")
    trainer.fit(learner, config, batches, val_sets, loss, options, run, print)
    if run is not None:
        finish(args, run, val_sets, learner, device)


def open_run(args: argparse.Namespace, run_dir: Path, epoch: int, val_names: list[str], record: dict[str, Any]) -> Any:
    """The run folder, cut back to what is done, with the flags of this start."""
    from image_io import write_text
    from run_folder import RunFolder

    weighted = args.use_only_add_val
    run = RunFolder(run_dir, epoch=epoch, val_names=val_names, decimal=args.decimal, weighted=weighted)
    write_text(run_dir / "args.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    run.tracking = tracking.open_tracking(args.track, run_dir, print)
    run.log_flags(record["flags"])
    return run


def train_in_memory(
    args: argparse.Namespace, argv: Sequence[str] | None, data: Data, run_dir: Path, device: str, processes: Any
) -> None:
    """Train; with `--batch auto` once more with half of the batch where the device has no memory for all of it."""
    from trainer import MemoryExhausted

    automatic = args.batch == "auto"
    if automatic:
        args.batch = automatic_batch(run_dir, device)
        print(f"batch: {args.batch}")
    try:
        train(args, data, run_dir, device, cli.run_record(args, argv), processes)
        return
    except MemoryExhausted:
        if not automatic or args.batch == 1:
            raise
    free_memory()
    print(f"the device has no memory for a batch of {args.batch}: going on with {args.batch // 2}")
    args.batch //= 2
    train(args, data, run_dir, device, cli.run_record(args, argv), processes)


def automatic_batch(run_dir: Path, device: str) -> int:
    """The batch that a run was begun with, else what is tried first."""
    path = run_dir / "args.json"
    if path.is_file() and (run_dir / "last_checkpoint").is_file():
        return int(json.loads(path.read_text(encoding="utf-8"))["flags"]["batch"])
    return GPU_BATCH if device.startswith("cuda") else DEFAULT_BATCH


def free_memory() -> None:
    """Give back what a run that has ended held of the device."""
    import gc

    import torch

    gc.collect()
    torch.cuda.empty_cache()


def find_rate(args: argparse.Namespace, data: Data, run_dir: Path, device: str, processes: Any) -> None:
    """Try learning rates on a copy of the network, draw the loss over them, say which to take; train nothing."""
    import lr_finder
    import plots
    from image_io import write_text

    if args.batch == "auto":
        args.batch = automatic_batch(run_dir, device)
    network, config = build_network(args, data, fresh=True)
    loss, batches = build_training_loss(args, config, data.pixels), build_batches(args, data, config, device, processes)
    result = lr_finder.find_rate(
        network, batches, loss, fit_options(args), config.num_logits, device=device, steps=args.lr_find
    )
    if not result.rates:
        raise ValueError(
            "the loss is not finite from the first step on; look at --loss and at the values of the images"
        )
    run_dir.mkdir(parents=True, exist_ok=True)
    marks = {"steepest fall": result.steepest, "a tenth of the lowest": result.suggestion}
    path = plots.rate_curve(result.rates, result.losses, result.smoothed, marks, run_dir / "lr_find.png")
    write_text(run_dir / "lr_find.json", json.dumps(asdict(result)) + "\n")
    print(f"{len(result.rates)} steps, rates from {result.rates[0]:.1e} to {result.rates[-1]:.1e}: {path}")
    if result.suggestion is None or result.steepest is None:
        print("the loss did not fall at any rate: no suggestion. More steps (--lr-find 300) or a larger batch may help")
    else:
        print(f"the loss falls fastest at {result.steepest:.1e} and is lowest at {10 * result.suggestion:.1e}")
        print(f"suggested: -lr {result.suggestion:.1g}")


def train_folds(
    args: argparse.Namespace, argv: Sequence[str] | None, run_dir: Path, device: str, processes: Any
) -> None:
    """Train the folds that were asked for, each in a run folder of its own; after all of them score them together."""
    import folds

    home = run_dir.with_name(f"{run_dir.name}_folds")
    checked, held = processes.first_does(lambda: deal_folds(args, home))
    chosen = range(args.folds) if args.fold == "all" else [int(args.fold)]
    for fold in chosen:
        own, fold_dir = argparse.Namespace(**vars(args)), run_dir.with_name(folds.fold_name(run_dir.name, fold))
        own.fold = str(fold)
        print(f"\nfold {fold}: {fold_dir}")
        part = folds.hold_out(checked, held, fold)
        data = processes.first_does(lambda own=own, fold_dir=fold_dir, part=part: prepare_fold(own, fold_dir, part))
        if args.lr_find:
            find_rate(own, data, fold_dir, device, processes)
            continue
        train_in_memory(own, argv, data, fold_dir, device, processes)
        free_memory()
    if not processes.first:
        return
    if args.fold == "all" and not args.lr_find:
        pool_folds(args, checked, held, run_dir, home, device)
    elif not args.lr_find:
        print("scores of all folds together: the same command with --fold all, when every fold is trained")


def deal_folds(args: argparse.Namespace, home: Path) -> tuple[Any, dict[str, int]]:
    """The checked data set, and the fold of each image."""
    import folds

    checked = check_data(args)
    classes, path = checked.raise_errors(), home / folds.FOLDS_FILE
    return checked, folds.load_or_choose_folds(path, checked.train, classes, args.group_pattern, args.folds)


def prepare_fold(args: argparse.Namespace, fold_dir: Path, part: Any) -> Data:
    """The data set of a fold, with the names of the images that it is scored on, as --ids of validate.py takes them."""
    from image_io import write_text

    check_run_folder(fold_dir)
    data = prepare_data(args, fold_dir, part)
    names = [pair.name.replace('"', '""') for pair in next(iter(data.val.values()))]
    write_text(fold_dir / "held_out.csv", "\n".join(["id", *(f'"{name}"' for name in names)]) + "\n")
    return data


def pool_folds(
    args: argparse.Namespace, checked: Any, held: dict[str, int], run_dir: Path, home: Path, device: str
) -> None:
    """Score the best network of each fold on what it was never shown, and the counts of all of them together."""
    import folds
    import metrics
    from backends import load_forward
    from checkpoint import load_checkpoint
    from classes import ClassMap
    from dataset import EvaluationSet
    from evaluation import build_scorer, score_set
    from image_io import write_text

    rows, pooled = [], None
    for fold in range(args.folds):
        name = folds.fold_name(run_dir.name, fold)
        path = run_dir.with_name(name) / f"{name}.pth"
        config, forward, _ = load_forward(path, device)
        pairs = [item.pair for item in checked.train if held[item.pair.name] == fold]
        data = EvaluationSet(pairs, ClassMap.from_config(config), config)
        result = score_set(forward, data, workers=args.workers, empty=args.empty, description=f"fold {fold}")
        pooled = pooled or build_scorer(config, empty=args.empty)
        if result.scorer:
            pooled.merge(result.scorer)
        scores = {key: result.summary[key] for key in ("iou", "dice")}
        rows.append({"fold": name, "images": len(pairs), "epoch": load_checkpoint(path)[1]["epoch"], **scores})
    assert pooled is not None, "there are two folds at least"
    content = folds.pool_rows(rows, pooled.summary())
    write_text(home / folds.POOLED_FILE, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    print(f"\nevery image scored by the network that was not shown it, {home / folds.POOLED_FILE}")
    print(folds.pool_table(content))
    print(metrics.score_table(content["pooled"]))


def say_optimisation(learner: Any, args: argparse.Namespace) -> None:
    """What an optimiser makes of the flags, and what a longer run does to the learning rate."""
    import optim

    if args.optim in optim.NOTES:
        print(f"warning: {optim.NOTES[args.optim]}")
    if learner.schedule.limit < 1:
        print(optim.describe_limit(learner.schedule, "--init-from with the best checkpoint"))


def say_changes(run_dir: Path, flags: dict[str, Any], saved: Any, config: Any, *, named: bool) -> None:
    """Name what differs from what the run was started with: flags, and the statistics of the training images.

    Raises:
        ValueError: the run was not `named` by the user and belongs to another data set.
    """
    if (saved.mean, saved.std) != (config.mean, config.std):
        print(f"warning: the training images changed since this run began: mean was {saved.mean}, is {config.mean}")
    path = run_dir / "args.json"
    if not path.is_file():
        return
    before = json.loads(path.read_text(encoding="utf-8"))["flags"]
    if not named and Path(before["dataset"]).resolve() != Path(flags["dataset"]).resolve():
        raise ValueError(f"{run_dir} holds a run on {before['dataset']}; give this one a name with --exp-name")
    quiet = {"epochs", "workers", "log_dir", "exp_name", "baselines", "cpu", "device", "encoder_weights", "init_from"}
    quiet |= {"decimal", "track", "worst", "dump_augmented"}
    for name in sorted(flags.keys() & before.keys() - quiet):
        if flags[name] != before[name]:
            print(f"warning: {name} was {before[name]} when this run began, it goes on with {flags[name]}")


def finish(args: argparse.Namespace, run: Any, val_sets: dict[str, Any], learner: Any, device: str) -> None:
    """Print the scores of the best checkpoint on the validation sets, with the baselines if they were asked for."""
    import baselines
    import metrics
    from checkpoint import load_checkpoint

    config, saved = load_checkpoint(run.best_path)
    summary = learner.best
    if summary is None:  # an earlier run of the command came to the best epoch
        learner.network.load_state_dict(saved["model_state_dict"])
        summary = score_again(args, learner.network, val_sets, device)
    print(f"\nbest epoch {saved['epoch']} of {learner.progress.epoch}, {run.best_path}")
    print(metrics.score_table(summary))
    print_sets(run, saved["epoch"], summary)
    first = next(iter(val_sets.values()))
    if args.baselines and any(first.slides):
        print("baselines are left out: they need whole images, and there are slides")
    elif args.baselines and config.num_logits == 1:
        print(*baselines.baseline_lines(baselines.score_baselines(first, empty=args.empty)), sep="\n")
    elif args.baselines:
        print(baselines.LEFT_OUT)
    run.log_result(vars(args), {f"hparam/{key}": summary[key] for key in ("iou", "dice")})
    run.close()
    print(f"tensorboard --logdir {shlex.quote(str(args.log_dir))}")


def score_again(args: argparse.Namespace, network: Any, val_sets: dict[str, Any], device: str) -> dict[str, Any]:
    """The summary that decides which epoch is best, of a network that was read from its checkpoint."""
    import evaluation
    from backends import torch_forward

    forward, chosen = torch_forward(network, device), dict(val_sets)
    if not args.use_only_add_val:
        chosen = dict([next(iter(val_sets.items()))])
    results = {
        name: evaluation.score_set(forward, data, workers=args.workers, empty=args.empty)
        for name, data in chosen.items()
    }
    if args.use_only_add_val:
        return evaluation.weighted_mean(results, {name: len(data) for name, data in chosen.items()}).summary
    return next(iter(results.values())).summary


def print_sets(run: Any, epoch: int, summary: dict[str, Any]) -> None:
    """A line for each validation set where there are several, from what was written down in the best epoch."""
    from metrics import score_text

    scored: dict[str, Any] = next((row["val"] for row in run.history if row["epoch"] == epoch), {})
    if run.weighted:
        mean = f"IoU {score_text(summary['iou'])}, Dice {score_text(summary['dice'])}"
        print(f"the table is of all pixels of all sets; the mean over sets that decides: {mean}")
    if len(run.val_names) > 1:
        for name in run.val_names:
            scores = scored.get(name)
            text = "not scored in this epoch"
            if scores:
                text = f"IoU {score_text(scores['iou'])}, Dice {score_text(scores['dice'])}"
            print(f"{name}: {text}")


if __name__ == "__main__":
    main()
