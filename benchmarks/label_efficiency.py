"""How many labels pretraining saves: train.py on a few labelled images, from random and from pretrained encoders.

Encoders are pretrained on the unlabelled images of nuclei/train, bubbles and froth by `pretrain.py`, each method for as
many steps. Then `train.py` learns from 4 and from 10 labelled images of nuclei/train and is scored on nuclei/val at
several points of the run: IoU at the threshold 0.5, from counts. The comparison is paired: for each subset every start
has the same images, seed, batches and number of steps. Each start has a learning rate of its own, the best of the same
few on one more subset, by images of nuclei/train that are not in it: nuclei/val decides nothing. On the larger subsets
pretrained encoders are also trained in half the steps. Few steps leave the moving averages of batch normalisation
behind the weights, so each run is scored a second time with its statistics re-estimated from the training images, and
then with each image counting alike.

The defaults are for two cores. A plain-unet of plain-16 at 96 pixels takes 0.18 s for a step of 8 crops on one of them,
and 1.1 s to pretrain with 64 pairs; a U-Net of resnet18 0.45 and 3.0 s, of resnet10t 0.35 and 2.0 s, which leaves too
few steps of either. All of it took an hour and three quarters, not alone on the machine. It is done in parts, by --jobs
processes; what was killed goes on.

Example:
    python -m benchmarks.label_efficiency --data data --out logs/label_efficiency
"""

import argparse
import json
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cli
from benchmarks.paired import draw_subset, format_rows, summarise
from benchmarks.part_queue import Commands, Part, Results, run_parts
from image_io import write_text

TITLES = {"random": "from scratch", "barlow": "Barlow Twins", "moco": "MoCo", "mocov3": "MoCo v3"}
LARGEST = 512  # side of the middle of an image that features are drawn of
METHODS = ("barlow", "moco", "mocov3", "dense")
RANDOM = "random"
MIDDLE = 128  # mean from which an image is a bright one
COLOURLESS = 2  # largest difference between the means of an image's channels that is no stain
WINDOWS = 160  # crops of the training images that statistics are re-estimated from
TUNING, HELD_OUT = 1000, 28  # seed of the subset that rates are chosen on, and the images that they are chosen by
FIRST = 100  # seed of the first subset
PROTOCOL = 2  # results of another one do not mix with these
SHARED = ("jobs", "threads", "data", "out", "settings")  # flags that change no result


def build_parser() -> argparse.ArgumentParser:
    """Flags of this benchmark."""
    parser = cli.make_parser("Training on few labels from random and from pretrained encoders, paired.")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="holds nuclei/, bubbles/ and froth/")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where parts, runs and results are kept")
    parser.add_argument("-m", "--model", default="plain-unet", metavar="NAME", help="architecture")
    parser.add_argument("--encoder", default="plain-16", metavar="NAME", help="encoder")
    parser.add_argument("--image-size", type=cli.positive_int, default=96, metavar="S", help="side of crops and views")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=["barlow", "moco", "dense"], help="how encoders are pretrained"
    )
    parser.add_argument("--views", default="microscopy", metavar="PRESET", help="views of pretrain.py")
    parser.add_argument(
        "--pretrain-steps", type=cli.positive_int, default=900, metavar="N", help="steps of each method"
    )
    parser.add_argument(
        "--pretrain-batch", type=cli.positive_int, default=64, metavar="N", help="pairs in each of them"
    )
    parser.add_argument(
        "--pretrain-flags", default="-lr 0.016", metavar="TEXT", help="more flags of pretrain.py, in one text"
    )
    parser.add_argument("--steps", type=cli.positive_int, default=240, metavar="N", help="steps of each training")
    parser.add_argument("--batch", type=cli.positive_int, default=8, metavar="N", help="crops in a step")
    parser.add_argument("--points", type=cli.positive_int, default=6, metavar="N", help="scorings of a training")
    parser.add_argument(
        "--subsets", type=subset_plan, nargs="+", default=[(4, 3), (10, 6)], metavar="L:N", help="N subsets of L images"
    )
    parser.add_argument(
        "--rates", type=cli.positive_float, nargs="+", default=[5e-4, 1e-3, 2e-3], metavar="X", help="rates to try"
    )
    parser.add_argument("--augmentation", default="medium", metavar="PRESET", help="preset of train.py")
    parser.add_argument("--jobs", type=cli.positive_int, default=2, metavar="N", help="processes at a time")
    parser.add_argument("--threads", type=cli.positive_int, default=1, metavar="N", help="threads of each")
    return parser


def subset_plan(text: str) -> tuple[int, int]:
    """Argparse type: labels and subsets with a colon between."""
    words = text.split(":")
    if len(words) != 2 or not all(word.isdecimal() and int(word) > 0 for word in words):
        raise argparse.ArgumentTypeError(f"{text!r}: expected labels and subsets, such as 10:6")
    return int(words[0]), int(words[1])


@dataclass(frozen=True)
class Bench:
    """What all parts know.

    images: words for --images. count: how many images these are. kinds: names of the labelled images that are dark,
    stained (bright and coloured) and white (bright and grey).
    """

    args: argparse.Namespace
    commands: Commands
    images: list[Path]
    count: int
    kinds: dict[str, list[str]]

    @property
    def out(self) -> Path:
        """Where everything is kept."""
        return Path(self.args.out)

    @property
    def starts(self) -> list[str]:
        """Names of the rows of the table."""
        return [RANDOM, *self.args.methods]


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, do what is left to do, print the table."""
    parser = build_parser()
    args = cli.parse(parser, argv)
    import torch

    again = "the same command goes on with the parts that are left"
    with cli.plain_errors(parser, interrupted=again):
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        if args.points % 2:
            raise cli.UsageError(f"--points {args.points}: half of the steps need half of them; give an even number")
        args.data, args.out = args.data.resolve(), args.out.resolve()
        check_settings(args)
        bench = prepare(args)
        torch.set_num_threads(args.threads)
        stop = bench.commands.stop
        results = run_parts(plan(bench), args.out / "parts", jobs=args.jobs, report=say, stop=stop)
        text = describe(bench, results)
        write_text(args.out / "table.md", text + "\n")
        say(text)
        for path in draw_pictures(bench, results):
            say(str(path))


def say(text: str) -> None:
    """Print at once, also into a file."""
    print(text, flush=True)


def check_settings(args: argparse.Namespace) -> None:
    """Keep the flags that decide results beside them.

    Raises:
        ValueError: the folder holds results of other flags.
    """
    flags = {key: value for key, value in vars(args).items() if key not in SHARED} | {"protocol": PROTOCOL}
    path, now = args.out / "settings.json", json.loads(json.dumps(flags))
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [key for key in now if before.get(key) != now[key]]
        if changed:
            raise ValueError(
                f"{args.out} holds results with {changed[0]} {before.get(changed[0])}, now it is {now[changed[0]]}; "
                "expected the same flags. Give another --out, or these flags"
            )
    write_text(path, json.dumps(now, indent=1) + "\n")


# ----------------------------------------------------------------------------------------------------------------------
# Data


def prepare(args: argparse.Namespace) -> Bench:
    """Copy the labelled set, with the statistics of all unlabelled images, and make the random encoders.

    Every training and every pretraining then normalises images in the same way.
    """
    from normalisation import image_mean, statistics
    from pairing import FileOptions, find_training
    from scan import scan_pairs
    from selfsupervised.images import check_images, find_images

    images = [args.data / "nuclei" / "train", args.data / "bubbles", args.data / "froth"]
    found = check_images(find_images(images))
    copied = args.out / "data"
    for split in ("train", "val"):
        if not (copied / split).is_dir():
            shutil.copytree(args.data / "nuclei" / split, copied / f"{split}.part", dirs_exist_ok=True)
            (copied / f"{split}.part").rename(copied / split)
    mean, std = statistics(found.facts)
    order = [2, 1, 0] if len(mean) == 3 else range(len(mean))
    lines = [" ".join(f"{row[place]:.9g}" for place in order) for row in (mean, std)]
    write_text(copied / "mean_vals.txt", "\n".join(lines) + "\n")
    names = [path.stem for path in sorted((copied / "val" / "images").iterdir())]
    write_text(args.out / "subsets" / "val.csv", "\n".join(["id", *names]) + "\n")
    kinds: dict[str, list[str]] = {"dark": [], "stained": [], "white": []}
    for item in scan_pairs(find_training(copied, FileOptions()).pairs):
        kinds[kind_of(image_mean(item))].append(item.pair.name)
    return Bench(args, Commands(args.threads), images, len(found.pairs), kinds)


def kind_of(means: Sequence[float]) -> str:
    """What sort of image has these means of its channels."""
    if sum(means) / len(means) < MIDDLE:
        return "dark"
    return "stained" if max(means) - min(means) > COLOURLESS else "white"


def encoder_path(bench: Bench, method: str) -> Path:
    """The encoder file of a method."""
    return bench.out / "logs" / f"pretrain_{method}" / f"pretrain_{method}.pth"


# ----------------------------------------------------------------------------------------------------------------------
# Parts


def plan(bench: Bench) -> list[Part]:
    """All parts; what others wait for comes first."""
    args = bench.args
    parts = [Part(f"pretrain_{method}", partial(pretrain, bench, method)) for method in args.methods]
    for start in (RANDOM, *args.methods):
        needs: tuple[str, ...] = () if start == RANDOM else (f"pretrain_{start}",)
        for rate in args.rates:
            work = partial(tune, bench, f"tune_{start}_{rate:g}", start, rate)
            parts.append(Part(f"tune_{start}_{rate:g}", work, needs))
    for labels, number in args.subsets:
        for seed in range(FIRST, FIRST + number):
            for start in bench.starts:
                name, needs = f"train_{start}_{labels}_{seed}", tuple(f"tune_{start}_{rate:g}" for rate in args.rates)
                parts.append(Part(name, partial(train_tuned, bench, name, start, labels, seed), needs))
    labels, number = max(args.subsets)
    for seed in range(FIRST, FIRST + number):
        for method in args.methods:
            name, needs = f"half_{method}_{labels}_{seed}", tuple(f"tune_{method}_{rate:g}" for rate in args.rates)
            work = partial(train_tuned, bench, name, method, labels, seed, share=0.5)
            parts.append(Part(name, work, needs))
    return parts


def pretrain(bench: Bench, method: str, _: Results) -> dict[str, Any]:
    """Pretrain an encoder by pretrain.py; what it took."""
    args, name = bench.args, f"pretrain_{method}"
    crops = max(8, -(-args.pretrain_batch // bench.count))
    each = bench.count * crops // args.pretrain_batch  # steps of an epoch
    epochs = -(-args.pretrain_steps // each)
    words = ["pretrain.py", "--images", *map(str, bench.images), "--method", method, "--encoder", args.encoder]
    words += ["--image-size", str(args.image_size), "--views", args.views, "--crops", str(crops), "-e", str(epochs)]
    words += ["-b", str(args.pretrain_batch), "--probe-every", str(max(1, epochs // 4)), "-w", "0", "--cpu"]
    words += ["--seed", "0", "-log", str(bench.out / "logs"), "--exp-name", name, *args.pretrain_flags.split()]
    bench.commands.run(words, bench.out / "output" / f"{name}.txt")
    rows = read_rows(bench, name)
    seconds = sum(row["seconds"] for row in rows)
    last = {"loss": rows[-1]["train"]["loss"], **rows[-1]["watch"]}
    return {"steps": each * epochs, "seconds": seconds, "images": bench.count, "epochs": epochs, **last}


def read_rows(bench: Bench, name: str) -> list[dict[str, Any]]:
    """What a run wrote down after each epoch."""
    path = bench.out / "logs" / name / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def tune(bench: Bench, name: str, start: str, rate: float, _: Results) -> dict[str, Any]:
    """Train with a rate on a subset that nothing else is learned from; scored on other images of its split."""
    labels = max(labels for labels, _ in bench.args.subsets)
    known = draw_subset(bench.kinds, labels, TUNING)
    others = {kind: [each for each in names if each not in known] for kind, names in bench.kinds.items()}
    held_out = draw_subset(others, min(HELD_OUT, sum(map(len, others.values()))), TUNING)
    return train(bench, name, start, labels, TUNING, rate, held_out=held_out)


def train_tuned(
    bench: Bench, name: str, start: str, labels: int, seed: int, results: Results, share: float = 1
) -> dict[str, Any]:
    """Train with the rate that was best for this start, a share of the steps."""
    return train(bench, name, start, labels, seed, best_rate(bench, start, results), share=share)


def best_rate(bench: Bench, start: str, results: Results) -> float:
    """The rate with the highest score when it was tuned, that with re-estimated statistics: it is the steadier one."""
    return float(max(bench.args.rates, key=lambda rate: results[f"tune_{start}_{rate:g}"]["settled"]))


def train(
    bench: Bench,
    name: str,
    start: str,
    labels: int,
    seed: int,
    rate: float,
    *,
    share: float = 1,
    held_out: Sequence[str] = (),
) -> dict[str, Any]:
    """Train by train.py on a subset; its scores at each point of the run, and those of score_again at the end.

    Args:
        share: of the steps. held_out: names of the training images that the end is scored on; none for nuclei/val.
    """
    args, logs = bench.args, bench.out / "logs"
    ids = bench.out / "subsets" / f"{labels}_{seed}.csv"
    write_text(ids, "\n".join(["id", *draw_subset(bench.kinds, labels, seed)]) + "\n")
    crops = max(1, round(args.steps * args.batch / (args.points * labels)))
    each, epochs = -(-crops * labels // args.batch), max(1, round(args.points * share))  # steps of an epoch
    weights = "none" if start == RANDOM else str(encoder_path(bench, start))
    words = ["train.py", "-d", str(bench.out / "data"), "--ids", str(ids)]
    words += ["--val-ids", str(bench.out / "subsets" / "val.csv"), "--class-list", "nonzero"]
    words += ["-m", args.model, "--encoder", args.encoder, "--encoder-weights", weights, "-lr", f"{rate:g}"]
    words += ["--image-size", str(args.image_size), "--crops", str(crops), "-a", args.augmentation]
    words += ["-b", str(args.batch), "-e", str(epochs), "--warmup", "0.5", "--loss", "0.5*bce+0.5*dice"]
    words += ["-w", "0", "--cpu", "--seed", str(seed), "-log", str(logs), "--exp-name", name]
    bench.commands.run(words, bench.out / "output" / f"{name}.txt")
    rows = read_rows(bench, name)
    scores = [next(iter(row["val"].values()))["iou"] or 0.0 for row in rows]
    curve = [[each * row["epoch"], score] for row, score in zip(rows, scores, strict=True)]
    seconds = sum(row["seconds"] for row in rows)
    return {
        "curve": curve,
        "final": scores[-1],
        "rate": rate,
        "seconds": seconds,
        **score_again(bench, name, ids, held_out),
    }


def score_again(bench: Bench, name: str, ids: Path, held_out: Sequence[str] = ()) -> dict[str, float]:
    """Score the weights at the end of a run once more, with statistics re-estimated from its training images.

    Returns:
        settled: IoU from the counts of all images. settled_each: mean of the images' own IoU.
    """
    import numpy as np

    from backends import torch_forward
    from classes import ClassMap
    from dataset import EvaluationSet
    from evaluation import Prediction, predict_samples
    from outputs import decide
    from pairing import list_pairs
    from selfsupervised.encoder_file import settle_statistics

    config, network = last_network(bench.out / "logs" / name)
    settle_statistics(network, training_windows(bench, ids, config))
    pairs = list_pairs(bench.out / "data" / ("train" if held_out else "val")).pairs
    pairs = [pair for pair in pairs if not held_out or pair.name in held_out]
    data = EvaluationSet(pairs, ClassMap.from_config(config), config)
    counts = []
    for found in predict_samples(torch_forward(network, "cpu"), data, workers=0):
        assert isinstance(found, Prediction) and found.mask is not None, "labelled images, no slides"
        pred, mask = decide(found.probs) == 1, found.mask == 1
        counts.append((int((pred & mask).sum()), int((pred | mask).sum())))
    shared, either = np.array(counts, float).T
    each = np.divide(shared, either, out=np.ones_like(shared), where=either > 0)  # nothing there, nothing found: right
    return {"settled": float(shared.sum() / max(1, either.sum())), "settled_each": float(each.mean())}


def last_network(run: Path) -> tuple[Any, Any]:
    """What a run ended with, not its best epoch: the description of its checkpoint and the network."""
    from backends import load_network
    from checkpoint import read_content

    config, network = load_network(run / f"{run.name}.pth")
    network.load_state_dict(read_content(run / "last_checkpoint")["model_state_dict"])
    return config, network.eval()


def training_windows(bench: Bench, ids: Path, config: Any) -> Any:
    """Random crops of the training images as they are, normalised, about WINDOWS of them."""
    import numpy as np
    import torch

    from dataset import Slot
    from pairing import list_pairs
    from selfsupervised.images import UnlabelledSet
    from selfsupervised.views import ViewMaker, ViewOptions

    wanted = set(ids.read_text(encoding="utf-8").split()[1:])
    pairs = [pair for pair in list_pairs(bench.out / "data" / "train").pairs if pair.name in wanted]
    maker = ViewMaker(
        "none", ViewOptions(bench.args.image_size), rgb=len(config.channels) == 3, value_range=config.value_range
    )
    views = UnlabelledSet(pairs, maker, config.channels, config.mean, config.std)
    each = -(-WINDOWS // len(pairs))
    samples = [
        sample for place in range(len(pairs)) for sample in views[tuple(Slot(place, seed) for seed in range(each))]
    ]
    return torch.from_numpy(np.stack([sample[1] for sample in samples]))


# ----------------------------------------------------------------------------------------------------------------------
# Results


def describe(bench: Bench, results: Results) -> str:
    """What was done and what came out, as Markdown; also written as results.json."""
    args = bench.args
    rates = {start: best_rate(bench, start, results) for start in bench.starts}
    lines = [
        f"{args.model} {args.encoder}, {args.image_size} pixels, batch {args.batch}, {bench.count} unlabelled images"
    ]
    for method in args.methods:
        done = results[f"pretrain_{method}"]
        lines.append(
            f"{method}: {done['steps']} steps of {args.pretrain_batch} pairs, {done['seconds']:.0f} s on "
            f"{args.threads} core; effective rank of features {done['feature_rank']:.1f}"
        )
    ends = [
        start for start, rate in rates.items() if len(args.rates) > 1 and rate in (min(args.rates), max(args.rates))
    ]
    lines += [f"best at an end of the rates that were tried: {', '.join(ends)}"] if ends else []
    lines.append("one pretraining of each method, so p is about the subsets alone")
    tables: dict[str, Any] = {}
    for labels, number in sorted(args.subsets):
        seeds = range(FIRST, FIRST + number)
        runs = {start: [results[f"train_{start}_{labels}_{seed}"] for seed in seeds] for start in bench.starts}
        tables[str(labels)] = rows = summarise(runs, RANDOM)
        steps = int(runs[RANDOM][0]["curve"][-1][0])
        lines += [
            "",
            f"{labels} labelled images, {number} subsets, {steps} steps; IoU in points, mean ± deviation:",
            "",
        ]
        lines.append(format_rows(rows, rates, steps))
    halves = {method: [results[f"half_{method}_{labels}_{seed}"] for seed in seeds] for method in args.methods}
    tables["half"] = rows = summarise({RANDOM: runs[RANDOM], **halves}, RANDOM)
    half = int(halves[args.methods[0]][0]["curve"][-1][0])
    lines += ["", f"The same with {half} steps, beside {steps} from scratch:", "", format_rows(rows[1:], rates, steps)]
    tuned = {key: [value["final"], value["settled"]] for key, value in results.items() if key.startswith("tune_")}
    content = {"rates": rates, "tuning": tuned, "tables": tables}
    write_text(bench.out / "results.json", json.dumps(content, indent=1) + "\n")
    return "\n".join(lines)


def draw_pictures(bench: Bench, results: Results) -> list[Path]:
    """Draw what encoders see in bubbles and froth, and what the trained networks make of validation images."""
    from image_io import write_image

    folder = bench.out / "pictures"
    folder.mkdir(exist_ok=True)
    pictures = {**feature_rows(bench), **prediction_rows(bench)}
    for name, picture in pictures.items():
        write_image(folder / f"{name}.png", picture)
    return [folder / f"{name}.png" for name in pictures]


def feature_rows(bench: Bench) -> dict[str, Any]:
    """For an image of bubbles and of froth: the principal components of each encoder's features."""
    import torch

    from dataset import load_image
    from image_io import normalise
    from normalisation import read_statistics
    from plots import picture_row, to_display
    from selfsupervised import pictures as draw
    from selfsupervised.encoder_file import settle_statistics
    from selfsupervised.encoders import build_encoder
    from selfsupervised.images import find_images

    mean, std, _ = read_statistics(bench.out / "data" / "mean_vals.txt")
    rows = {}
    for folder in bench.images[1:]:
        pair = find_images([folder])[-1]
        image = load_image(pair, (), ())[0]
        image = image.repeat(len(mean), axis=2) if image.shape[2] == 1 else image
        top, left = (max(0, (side - LARGEST) // 2) for side in image.shape[:2])
        image = image[top : top + LARGEST, left : left + LARGEST]
        image = image[: image.shape[0] // 32 * 32, : image.shape[1] // 32 * 32]
        tensor = torch.from_numpy(normalise(image, mean[::-1].tolist(), std[::-1].tolist()))
        tiles, first = [("image", to_display(image))], None
        for start in bench.starts:
            torch.manual_seed(0)
            encoder = build_encoder(bench.args.encoder, len(mean)).eval()
            if start == RANDOM:
                settle_statistics(encoder, tensor[None])
            else:
                saved = torch.load(encoder_path(bench, start), weights_only=True)
                encoder.load_state_dict(saved["encoder_state_dict"])
            components = draw.principal_components(draw.dense_features(encoder, tensor))
            size = (len(components), components.shape[1])
            first = draw.align(components, draw.brightness(tiles[0][1], size), first)  # the same colours in a row
            title = "random" if start == RANDOM else TITLES.get(start, start)
            tiles.append((title, draw.enlarge(draw.to_colours(first), image.shape[:2])))
        rows[f"features_{folder.name}"] = picture_row(tiles, "principal components of dense features")
    return rows


def prediction_rows(bench: Bench) -> dict[str, Any]:
    """For a dark and a bright validation image: errors of the networks that learned from the first subset."""
    import numpy as np

    from backends import torch_forward
    from classes import ClassMap
    from dataset import EvaluationSet, load_image
    from evaluation import Prediction, predict_samples
    from outputs import decide
    from pairing import list_pairs
    from plots import comparison_row

    labels = max(labels for labels, _ in bench.args.subsets)
    pairs = list_pairs(bench.out / "data" / "val").pairs
    images = [load_image(pair, (), ())[0] for pair in pairs]
    bright = np.array([image.mean() for image in images])
    ranked, light = np.argsort(bright), int((bright >= MIDDLE).sum())
    places = {"dark": int(ranked[(len(ranked) - light) // 2]), "bright": int(ranked[-(light // 2 + 1)])}
    preds: dict[str, dict[str, Any]] = {kind: {} for kind in places}
    masks = {}
    for start in [RANDOM, *bench.args.methods]:
        config, network = last_network(bench.out / "logs" / f"train_{start}_{labels}_{FIRST}")
        data = EvaluationSet([pairs[place] for place in places.values()], ClassMap.from_config(config), config)
        found = predict_samples(torch_forward(network, "cpu"), data, workers=0)
        for kind, prediction in zip(places, found, strict=True):
            assert isinstance(prediction, Prediction) and prediction.mask is not None, "labelled images, no slides"
            pred, mask = decide(prediction.probs), prediction.mask
            iou = np.logical_and(pred == 1, mask == 1).sum() / max(1, np.logical_or(pred == 1, mask == 1).sum())
            preds[kind][f"{TITLES.get(start, start)}, IoU {iou:.2f}"] = pred
            masks[kind] = mask
    title = f"trained on {labels} images"
    return {
        f"predictions_{kind}": comparison_row(
            images[place], masks[kind], preds[kind], ("background", "object"), f"{title}: {pairs[place].name}"
        )
        for kind, place in places.items()
    }


if __name__ == "__main__":
    main()
