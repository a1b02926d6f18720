"""How good and how fast draft labels are without weights, beside the predecessor's settings and thirty plain lines.

Examples:
    python -m benchmarks.annotate quality --data real
    python -m benchmarks.annotate quality --nuclei kept_back/nuclei --bubbles kept_back/bubbles --worst 10
    python -m benchmarks.annotate tune --pairs 5
    python -m benchmarks.annotate speed --count 8

A set is a folder with images/ and gt/ in it, at any depth. `quality` scores the default call and the others on the same
pictures, in the same run, a picture after the other. `tune` chooses settings on two pictures of bubbles and scores them
on the others, for every two of them. `speed` runs on mosaics of real pictures, each mirrored at its sides until it
fills the square: the engine alone, beside floors, and annotate.py with all that it writes. F1 is at IoU 0.5.
"""

import argparse
import itertools
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
import numpy as np

import cli
from annotation import engine_options, engines, score_options, scoring, tune_options, tuning
from annotation.processes import keep_memory
from image_io import list_images, read_image, write_image

ROOT = Path(__file__).resolve().parent.parent
SETS = ("nuclei", "bubbles")
MIN_AREA = {"nuclei": 0, "bubbles": 30}  # smaller objects are left out on both sides
WAYS = {  # of labelling: name to flags
    "default": {},
    "ctci": {"preset": "ctci"},
    "ctci-code": {"preset": "ctci-code"},
}
PLAIN = "plain lines"
BRIGHT = 0.5  # of the range: a picture whose median is brighter is stained, a darker one is fluorescence
SIDES = (1024, 2048, 4096)  # of mosaics
LARGE = 2  # mosaics that the engine sees in every size
CALLS = (["-w1"], ["-w2"], ["-w2", "--panels", "--geojson"])  # of calling the command: the last writes everything


def build_parser() -> argparse.ArgumentParser:
    """Flags of benchmarks.annotate."""
    parser = cli.make_parser("Quality and speed of draft labels made without weights.")
    parser.add_argument("what", choices=("quality", "tune", "speed"), help="which measurement")
    parser.add_argument(
        "--data",
        type=Path,
        default=os.environ.get("TESSERA_DATA"),
        metavar="DIR",
        help="folder with the sets nuclei and bubbles; default: the environment's TESSERA_DATA",
    )
    for name in SETS:
        parser.add_argument(f"--{name}", type=Path, metavar="DIR", help=f"another folder for the set {name}")
    parser.add_argument("--limit", type=cli.positive_int, metavar="N", help="N pictures of each set, for a quick look")
    parser.add_argument("--repeats", type=cli.positive_int, default=3, metavar="N", help="runs of each; medians count")
    parser.add_argument("--worst", type=cli.natural, default=0, metavar="N", help="quality: name the N worst pictures")
    parser.add_argument(
        "--pairs", type=cli.positive_int, metavar="N", help="tune: N of all ways to choose two pictures"
    )
    parser.add_argument("--trials", type=cli.positive_int, metavar="N", help="tune: settings that are tried")
    parser.add_argument(
        "-w", "--workers", type=cli.positive_int, default=2, metavar="N", help="tune: searches at a time"
    )
    parser.add_argument("--count", type=cli.positive_int, default=4, metavar="N", help="speed: mosaics of each set")
    parser.add_argument("--side", type=cli.positive_int, default=2048, metavar="N", help="speed: side of the files")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table."""
    parser = build_parser()
    args = cli.parse(parser, argv)
    cli.share_cores()
    keep_memory()  # as annotate.py does
    with cli.plain_errors(parser):
        {"quality": quality, "tune": tune, "speed": speed}[args.what](args)


# ----------------------------------------------------------------------------------------------------------------------
# Pictures


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture with its reference.

    Attributes:
        kind: of nuclei fluorescence or stained, otherwise empty.
        image: (H, W, C). labels: (H, W) int32.
    """

    name: str
    group: str
    kind: str
    image: np.ndarray
    labels: np.ndarray

    @property
    def megapixels(self) -> float:
        """Of the picture."""
        return self.labels.size / 1e6


def read_sets(args: argparse.Namespace, names: Sequence[str] = SETS) -> list[Picture]:
    """The pictures of the sets that are there.

    Raises:
        UsageError: there is none.
    """
    pictures = []
    for name in names:
        folder = getattr(args, name) or (args.data and Path(args.data) / name)
        pictures += read_set(folder, name, args.limit) if folder else []
    if not pictures:
        raise cli.UsageError(
            f"no pictures of {' or '.join(names)} in {args.data}; expected images/ and gt/ in a folder of that name: "
            "give --data DIR, or set TESSERA_DATA"
        )
    return pictures


def read_set(folder: Path, group: str, limit: int | None = None) -> list[Picture]:
    """The pictures of every images/ with a gt/ beside it, in and below a folder; `limit` of them, evenly spread."""
    found = []
    for place in sorted(folder.glob("**/images")):
        if not (place.parent / "gt").is_dir():
            continue
        references = scoring.References(score_options.ScoreOptions(place.parent / "gt"))
        found += [(path, references, stem) for stem, path in sorted(list_images(place).items()) if stem in references]
    pictures = []
    for path, references, stem in spread(found, limit or len(found)):
        image = read_image(path)
        kind = "" if group != "nuclei" else "stained" if is_bright(image) else "fluorescence"
        pictures.append(Picture(stem, group, kind, image, references.read(stem, image.shape[:2])))
    return pictures


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """Some items, evenly spread."""
    places = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[place] for place in places]


def is_bright(image: np.ndarray) -> bool:
    """Whether most of a picture is bright: stained tissue lies on white glass, fluorescence shines in the dark."""
    top = np.iinfo(image.dtype).max if image.dtype.kind == "u" else float(np.nanmax(image))
    return float(np.nanmedian(image[..., :3].mean(axis=2))) > BRIGHT * top


# ----------------------------------------------------------------------------------------------------------------------
# The plain reference: what one writes in an hour


def plain_labels(image: np.ndarray, group: str) -> np.ndarray:
    """Objects (H, W) int32 by blur, threshold, filling and a watershed of the distance."""
    grey = cv2.normalize(image[..., :3].mean(axis=2), None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)
    mask = fill(rims(grey) if group == "bubbles" else areas(grey))
    distance = cv2.GaussianBlur(cv2.distanceTransform(mask, cv2.DIST_L2, 5), (0, 0), 2)
    peaks = (distance == cv2.dilate(distance, np.ones((11, 11)))) & (mask > 0)
    count, seeds = cv2.connectedComponents(peaks.astype(np.uint8))
    seeds[mask == 0] = count  # cv2.watershed floods by steps of colour: over the edge of the mask last
    labels = cv2.watershed(cv2.merge([mask] * 3), seeds)
    labels[labels == count] = 0
    lines = labels < 0  # they belong to an object beside them
    labels[lines] = cv2.dilate(labels.astype(np.float32), np.ones((3, 3)))[lines]
    return np.where(mask > 0, np.maximum(labels, 0), 0)


def areas(grey: np.ndarray) -> np.ndarray:
    """What Otsu's threshold parts; objects are the side that covers less."""
    mask = cv2.threshold(cv2.GaussianBlur(grey, (0, 0), 1), 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)[1]
    mask = mask if np.count_nonzero(mask) * 2 < mask.size else 255 - mask
    return cv2.morphologyEx(mask, cv2.MORPH_OPEN, np.ones((3, 3)))


def rims(grey: np.ndarray) -> np.ndarray:
    """What is brighter than around it, closed."""
    blurred = cv2.GaussianBlur(grey, (0, 0), 1)
    mask = cv2.adaptiveThreshold(blurred, 255, cv2.ADAPTIVE_THRESH_MEAN_C, cv2.THRESH_BINARY, 51, -8)
    return cv2.morphologyEx(mask, cv2.MORPH_CLOSE, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (3, 3)))


def fill(mask: np.ndarray) -> np.ndarray:
    """A mask without holes."""
    contours = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0]
    return cv2.drawContours(np.zeros_like(mask), contours, -1, 255, cv2.FILLED)


# ----------------------------------------------------------------------------------------------------------------------
# Engines


def default_flags(*words: str) -> argparse.Namespace:
    """The flags of annotate.py that choose objects, as by default but for `words`."""
    parser = argparse.ArgumentParser()
    engine_options.add_engine_args(parser)
    score_options.add_score_args(parser)
    tune_options.add_tune_args(parser)
    return parser.parse_args(words)


def engine_with(settings: Mapping[str, Any] | None = None) -> engines.Engines:
    """The engine of the default call, with other settings."""
    return engines.Engines(engine_options.with_settings(default_flags(), settings or {}, "cpu"))


def make_finders() -> dict[str, Callable[[Picture], np.ndarray]]:
    """What is compared: name to function of a picture that gives labels."""

    def finder(settings: Mapping[str, Any]) -> Callable[[Picture], np.ndarray]:
        engine = engine_with(settings)
        return lambda picture: engine.find(picture.image)[0].labels

    found = {name: finder(settings) for name, settings in WAYS.items()}
    return {**found, PLAIN: lambda picture: plain_labels(picture.image, picture.group)}


@dataclass(frozen=True)
class Taken:
    """Median seconds of a run: on the clock, and of processors, its own and those of processes that it starts."""

    wall: float
    cpu: float


def in_turns(runs: Mapping[str, Callable[[], Any]], repeats: int) -> tuple[dict[str, Taken], dict[str, Any]]:
    """Seconds and the result of each, run in turns so that the machine's drift meets all of them."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    results = {}
    for _ in range(repeats):
        for name, run in runs.items():
            begin = time.perf_counter(), processor_seconds()
            results[name] = run()
            times[name].append((time.perf_counter() - begin[0], processor_seconds() - begin[1]))
    taken = {name: Taken(*(statistics.median(one) for one in zip(*each, strict=True))) for name, each in times.items()}
    return taken, results


def processor_seconds() -> float:
    """Spent by this process, and by those it started that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


# ----------------------------------------------------------------------------------------------------------------------
# Quality


def quality(args: argparse.Namespace) -> None:
    """F1 and seconds a megapixel of each way on each set, in one process."""
    pictures, finders = read_sets(args), make_finders()
    seconds: list[dict[str, Taken]] = []
    scores: list[dict[str, scoring.LabelScores]] = []
    for picture in pictures:
        taken, labels = in_turns({name: partial(find, picture) for name, find in finders.items()}, args.repeats)
        area = MIN_AREA[picture.group]
        seconds.append(taken)
        scores.append({name: scoring.score_labels(labels[name], picture.labels, area) for name in finders})
    print(
        f"medians of {args.repeats} runs in turns, one process; F1 at IoU 0.5 over all objects, and its mean over "
        f"images;\nnuclei are stained where the median of a picture is above {BRIGHT:g} of its range, otherwise "
        f"fluorescence;\nof bubbles objects under {MIN_AREA['bubbles']} pixels are left out on both sides"
    )
    columns = ("F1", "mean", "precision", "recall", "Dice", "s/MP", "cpu s/MP")
    print(f"{'':<21}{'images':>7}{'MP':>7}{'objects':>8}  {'':<18}{''.join(f'{name:>10}' for name in columns)}")
    for title, members in group_pictures(pictures).items():
        total = sum(pictures[i].megapixels for i in members)
        for name in finders:
            row = quality_row([scores[i][name] for i in members])
            times = [seconds[i][name] for i in members]
            pace = sum(each.wall for each in times) / total, sum(each.cpu for each in times) / total
            head = f"{title:<21}{len(members):>7}{total:>7.1f}{row.pop('objects'):>8}"
            print(f"{head}  {name:<18}{''.join(f'{value:>10.3f}' for value in (*row.values(), *pace))}")
    print_worst(pictures, scores, args.worst)


def group_pictures(pictures: Sequence[Picture]) -> dict[str, list[int]]:
    """Title of a row to the places of its pictures: the sets, and their kinds."""
    titles = dict.fromkeys(title for p in pictures for title in (p.group, f"{p.group} {p.kind}".strip()))
    return {title: [i for i, p in enumerate(pictures) if title in (p.group, f"{p.group} {p.kind}")] for title in titles}


def quality_row(scores: Sequence[scoring.LabelScores]) -> dict[str, Any]:
    """Scores over pictures: of all objects together, and the mean of F1 over the pictures that have any."""
    board = scoring.ScoreBoard()
    for number, one in enumerate(scores):
        board.add(str(number), one)
    found = board.summary()[scoring.EVERY]
    at = found["at"][0]
    values = {"F1": at["f1"], "mean": found["f1_50_per_image"], "precision": at["precision"], "recall": at["recall"]}
    return {"objects": found["true"], **{k: v or 0.0 for k, v in values.items()}, "Dice": found["dice"] or 0.0}


def print_worst(pictures: Sequence[Picture], scores: Sequence[Mapping[str, scoring.LabelScores]], count: int) -> None:
    """Name the pictures that the default call does worst on."""
    order = sorted(range(len(pictures)), key=lambda i: scores[i]["default"].f1() or 0.0)[:count]
    for i in order:
        ours, plain = (scores[i][name].summary() for name in ("default", PLAIN))
        height, width = pictures[i].labels.shape
        print(
            f"{pictures[i].group} {pictures[i].kind} {pictures[i].name[:24]} {height}x{width}: F1 "
            f"{ours['f1_50'] or 0:.3f} (plain lines {plain['f1_50'] or 0:.3f}), {ours['predicted']} objects for "
            f"{ours['true']}"
        )


# ----------------------------------------------------------------------------------------------------------------------
# Tuning


def tune(args: argparse.Namespace) -> None:
    """Choose settings on two pictures of bubbles and score them on the others, for all ways to choose two."""
    pictures = read_sets(args, ("bubbles",))
    pairs = list(itertools.combinations(range(len(pictures)), 2))
    pairs = spread(pairs, args.pairs or len(pairs))
    workers = min(args.workers, len(pairs))
    jobs = [(pictures, pair, args.trials) for pair in pairs]
    print(f"{len(pictures)} pictures, {len(pairs)} ways to choose two, {workers} at a time; F1: mean over the others")
    print(f"{'tuned on':<44}{'seconds':>8}{'default':>9}{'tuned':>8}{'all':>8}  chosen")
    rows = []
    with ExitStack() as stack:
        run = map
        if workers > 1:
            pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=cli.share_cores)
            run = stack.enter_context(pool).map  # type: ignore[assignment]
        for pair, row in zip(pairs, run(tune_pair, jobs), strict=True):
            rows.append(row)
            names = " ".join(f"{pictures[i].name[:20]:<21}" for i in pair)
            numbers = f"{row['seconds']:>8.1f}{row['default']:>9.3f}{row['tuned']:>8.3f}{row['pooled']:>8.3f}"
            print(f"{names:<44}{numbers}  {row['chosen']}", flush=True)
    for name, what in (("mean", statistics.fmean), ("lowest", min), ("highest", max), ("spread", statistics.pstdev)):
        values = [what([row[column] for row in rows]) for column in ("seconds", "default", "tuned", "pooled")]
        print(f"{name:<44}{values[0]:>8.1f}{values[1]:>9.3f}{values[2]:>8.3f}{values[3]:>8.3f}")
    gained = sum(row["tuned"] > row["default"] for row in rows)
    lost = sum(row["tuned"] < row["default"] for row in rows)
    print(f"better than the default: {gained}, worse: {lost}, the same: {len(rows) - gained - lost}")


def tune_pair(job: tuple[Sequence[Picture], tuple[int, int], int | None]) -> dict[str, Any]:
    """Tune on two pictures as `annotate.py --tune 2` does; F1 on the others before and after."""
    pictures, pair, trials = job
    area = MIN_AREA["bubbles"]
    words = ["--tune=2", "--against=.", f"--score-min-area={area}", *([f"--tune-trials={trials}"] if trials else [])]
    flags = default_flags(*words)
    options = engine_options.options_from(flags, "cpu")
    loaded = engines.Engines(options)

    def segment(image: np.ndarray, settings: Mapping[str, Any], cache: engines.Cache) -> Any:
        return loaded.changed(engine_options.with_settings(flags, settings, "cpu")).find(image, cache)[0]

    samples = [tuning.Sample(pictures[i].name, pictures[i].image, pictures[i].labels) for i in pair]
    begin = time.perf_counter()
    best = tuning.tune(segment, engine_options.space_of(options), samples, tune_options.options_from(flags)).best
    seconds = time.perf_counter() - begin
    others = [picture for i, picture in enumerate(pictures) if i not in pair]
    rows = []
    for settings in ({}, best.settings):
        found = [segment(picture.image, settings, {}).labels for picture in others]
        scores = [scoring.score_labels(f, p.labels, area) for f, p in zip(found, others, strict=True)]
        rows.append(quality_row(scores))
    tuned = {"tuned": rows[1]["mean"], "pooled": rows[1]["F1"]}
    return {"seconds": seconds, "default": rows[0]["mean"], **tuned, "chosen": best.settings or "the default"}


# ----------------------------------------------------------------------------------------------------------------------
# Speed


def make_mosaic(image: np.ndarray, side: int) -> np.ndarray:
    """A picture mirrored at its sides until it fills a square, (side, side, 1 or 3)."""
    image = image[..., : 3 if image.shape[2] >= 3 else 1]
    height, width = image.shape[:2]
    wide = np.pad(image, ((0, max(0, side - height)), (0, max(0, side - width)), (0, 0)), mode="symmetric")
    return np.ascontiguousarray(wide[:side, :side])


def pick_sources(pictures: Sequence[Picture], count: int) -> dict[str, list[np.ndarray]]:
    """Pictures of each set, evenly spread, of nuclei both kinds in turns."""
    chosen: dict[str, list[np.ndarray]] = {}
    for group in dict.fromkeys(picture.group for picture in pictures):
        kinds = sorted({picture.kind for picture in pictures if picture.group == group})
        rows = [spread([p for p in pictures if (p.group, p.kind) == (group, kind)], count) for kind in kinds]
        mixed = [p for row in itertools.zip_longest(*rows) for p in row if p is not None]
        chosen[group] = [p.image for p in mixed[:count]]
    return chosen


def speed(args: argparse.Namespace) -> None:
    """Seconds a megapixel of the engine, beside floors and by size, and of the whole command."""
    sources = pick_sources(read_sets(args), args.count)
    for group, images in sources.items():
        engine_table(group, images[:LARGE], args)
    with tempfile.TemporaryDirectory() as scratch:
        command_table(sources, args, Path(scratch))


def engine_table(group: str, images: Sequence[np.ndarray], args: argparse.Namespace) -> None:
    """The engine alone, decoded image to labels, in one process: sizes, and floors at the middle one."""
    engine = engine_with()
    runs: dict[str, Callable[[], Any]] = {}
    sides = [side * args.side // 2048 for side in SIDES]
    for side in sides:
        mosaics = [make_mosaic(image, side) for image in images]
        runs[f"engine {side}"] = partial(find_all, engine, mosaics)
        if side == args.side:
            runs |= make_floors(mosaics)
    for run in runs.values():
        run()  # what is loaded or allocated once is not counted
    seconds, _ = in_turns(runs, args.repeats)
    area = {name: int(name.split()[1]) if name.startswith("engine") else args.side for name in runs}
    total = {name: len(images) * area[name] ** 2 / 1e6 for name in runs}
    ours = seconds[f"engine {args.side}"]
    print(f"{group}: engine alone on mosaics, {len(images)} of each size, one process, medians of {args.repeats}")
    print(f"    {'':<26}{'s/MP':>9}{'cpu s/MP':>10}{'engine at ' + str(args.side) + ' / it':>22}{'of cpu':>8}")
    for name, taken in seconds.items():
        share = total[name] / total[f"engine {args.side}"]
        ratios = f"{ours.wall / taken.wall * share:>22.2f}{ours.cpu / taken.cpu * share:>8.2f}"
        print(f"    {name:<26}{taken.wall / total[name]:>9.4f}{taken.cpu / total[name]:>10.4f}{ratios}")
    first, last = (f"engine {side}" for side in (sides[0], sides[-1]))
    growth = [
        getattr(seconds[last], what) / getattr(seconds[first], what) * total[first] / total[last]
        for what in ("wall", "cpu")
    ]
    print(f"    s/MP at {sides[-1]} / at {sides[0]}: {growth[0]:.2f}, of cpu {growth[1]:.2f}")


def find_all(engine: engines.Engines, images: Sequence[np.ndarray]) -> None:
    """Label one picture after the other."""
    for image in images:
        engine.find(image)


def make_floors(mosaics: Sequence[np.ndarray]) -> dict[str, Callable[[], Any]]:
    """Single steps of OpenCV on the same pictures: their inputs are made before."""
    greys = [cv2.normalize(each.mean(axis=2), None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8) for each in mosaics]
    masks = [areas(grey) for grey in greys]
    light = [grey.astype(np.float32) for grey in greys]
    distances = [cv2.distanceTransform(mask, cv2.DIST_L2, 5) for mask in masks]
    peaks = [(each == cv2.dilate(each, np.ones((9, 9)))) & (each > 0) for each in distances]
    seeds = [cv2.connectedComponents(each.astype(np.uint8))[1] for each in peaks]  # they flood the whole picture
    colours = [cv2.merge([grey] * 3) for grey in greys]
    return {
        "cv2.distanceTransform": lambda: [cv2.distanceTransform(mask, cv2.DIST_L2, 5) for mask in masks],
        "cv2.watershed": lambda: [cv2.watershed(c, s.copy()) for c, s in zip(colours, seeds, strict=True)],
        "cv2.GaussianBlur, sigma 2": lambda: [cv2.GaussianBlur(each, (0, 0), 2) for each in light],
    }


def command_table(sources: Mapping[str, Sequence[np.ndarray]], args: argparse.Namespace, folder: Path) -> None:
    """annotate.py as a user runs it, and what its start takes: the same with pictures of 64 pixels."""
    runs: dict[str, Callable[[], Any]] = {}
    for group, images in sources.items():
        suffix = ".png" if group == "nuclei" else ".tif"
        for number, image in enumerate(images):
            write_image(folder / group / f"mosaic{number}{suffix}", make_mosaic(image, args.side))
            write_image(folder / f"{group}_start" / f"mosaic{number}{suffix}", make_mosaic(image, 64))
        for words in CALLS:
            for place in (group, f"{group}_start"):
                runs[" ".join((place, *words))] = partial(run_command, folder / place, words)
    seconds, _ = in_turns(runs, args.repeats)
    print(f"annotate.py, files of {args.side}x{args.side}, {args.count} of each set, medians of {args.repeats}")
    columns = f"{'seconds':>9}{'of start':>9}{'s/MP':>8}{'after start':>13}{'cpu s/MP':>10}{'after start':>13}"
    print(f"    {'':<28}{'MP':>7}{columns}")
    for name, taken in seconds.items():
        place, *words = name.split()
        if place in sources:
            start = seconds[" ".join((f"{place}_start", *words))]
            total = len(sources[place]) * args.side**2 / 1e6
            wall = f"{taken.wall:>9.2f}{start.wall:>9.2f}{taken.wall / total:>8.3f}"
            numbers = f"{total:>7.1f}{wall}{(taken.wall - start.wall) / total:>13.3f}"
            cpu = f"{taken.cpu / total:>10.3f}{(taken.cpu - start.cpu) / total:>13.3f}"
            print(f"    {name:<28}{numbers}{cpu}")


def run_command(images: Path, words: Sequence[str]) -> None:
    """annotate.py over a folder into a new one.

    Raises:
        RuntimeError: it failed.
    """
    with scratch_folder(images.parent) as output:
        flags = [f"--images={images}", f"--output-dir={output / 'labels'}", f"--log-dir={output / 'logs'}", *words]
        done = subprocess.run([sys.executable, str(ROOT / "annotate.py"), *flags], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"annotate.py {' '.join(flags)} failed: {done.stderr.strip()[-500:]}")


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A folder that is gone afterwards."""
    folder = Path(tempfile.mkdtemp(dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
