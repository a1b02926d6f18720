"""Predict one picture or slide: read, through the network, into its files, with a record of what it was made from."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from tqdm import tqdm

from backends import Forward, megapixels_seen
from checkpoint import ModelConfig
from pairing import Pair
from pictures import PILLOW_SUFFIXES, count_pixels
from predictor import Picture, Plan, ReadOptions, TileOptions, plan_picture, predict_picture, thumbnail
from result_record import begin_record, end_record
from results import Frame, ResultOptions, Results, check_disk
from slide_windows import SlideOptions, is_slide
from tiling import TTA
from unlike import Told


@dataclass(frozen=True)
class Setup:
    """What is the same for all images of a run.

    digest: of the checkpoints' content and of every flag that changes a result, but not of the kinds of results, which
    do not change one another. say: takes the lines that a user is to read. told: what was said about pictures so far.
    """

    configs: list[ModelConfig]
    read: ReadOptions
    tiles: TileOptions
    results: ResultOptions
    full_size: bool
    digest: str
    say: Callable[[str], None]
    told: Told = field(default_factory=Told)


@dataclass(frozen=True)
class Engine:
    """What runs the networks; bits differ between engines, so a slide that one began is not finished by another."""

    forward: Forward
    name: str


def picture_digest(setup: Setup, pair: Pair) -> str:
    """Of the flags, the checkpoints and the image files: with the same digest results of a kind are the same."""
    facts: list[Any] = [setup.digest]
    for path in pair.layers:
        status = path.stat()
        facts.append([str(path.resolve()), status.st_size, status.st_mtime_ns])
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def predict_one(setup: Setup, engine: Engine, pair: Pair, *, with_picture: bool) -> tuple[np.ndarray | None, list[str]]:
    """Predict one image and write its results.

    Returns:
        A small overlay (h, w, 3) uint8 if it was asked for, and what could not be decoded.
    """
    digest, begin = picture_digest(setup, pair), time.perf_counter()
    folder, kinds = setup.results.folder, setup.results.kinds
    with Picture(pair, setup.configs, setup.read) as picture:
        for note in picture.notes:
            setup.told.tell(setup.say, pair.name, note)
        plan = plan_picture(picture, tiles_for(setup, pair), full_size=setup.full_size)
        if plan.tissue:
            skipped = 1 - plan.tiles / (len(plan.rows.origins) * len(plan.cols.origins))
            setup.say(
                f"{pair.name}: tissue on {plan.tissue.share:.1%} of the slide, {skipped:.1%} of the tiles skipped"
            )
        frame = frame_of(pair.name, picture, plan)
        if "rle" in kinds and frame.scale != 1:
            setup.say(
                f"warning: {pair.name}: run lengths are on the grid read, not the slide's own pixels (--full-size)"
            )
        check_disk(frame, setup.configs[0], setup.results)
        with Results(frame, setup.configs[0], setup.results, f"{digest} {engine.name}") as results:
            begin_record(folder, pair.name, digest, kinds, {"scale": frame.scale, "mpp": frame.mpp})
            megapixel = fill_rows(setup, engine, picture, plan, results)
            summary = results.finish(
                lambda step: thumbnail(picture.slide, frame.height, frame.width, step), with_picture=with_picture
            )
            damage = results.damage
            seconds = time.perf_counter() - begin
            facts = {"damage": damage, "scale": frame.scale, "mpp": frame.mpp}
            end_record(folder, pair.name, digest, kinds, summary.files, facts, durable=seconds > 1)
            results.remove()
        for finding in picture.findings:
            setup.told.tell(setup.say, pair.name, finding)
    setup.say(f"{pair.name}: {summary.text()}; {megapixel:.1f} MP in {seconds:.1f} s, {megapixel / seconds:.2f} MP/s")
    return summary.picture, damage


def tiles_for(setup: Setup, pair: Pair) -> TileOptions:
    """How one image is cut: with --tissue auto, slides get the rule of the training, and other images none."""
    rule = setup.tiles.tissue
    if rule == "auto":
        rule = setup.configs[0].tissue if is_slide(pair, SlideOptions.from_config(setup.configs[0])) else "none"
    return replace(setup.tiles, tissue="" if rule == "none" else rule)


def fill_rows(setup: Setup, engine: Engine, picture: Picture, plan: Plan, results: Results) -> float:
    """Run the network over the rows that are missing; return their megapixels of the grid."""
    name, height, first = results.frame.name, results.frame.height, results.first_row
    if first:
        setup.say(f"{name}: going on at row {first} of {height}")
    if first < height:
        with (
            progress(name, picture, first * picture.height // height) as count,
            closing(predict_picture(picture, engine.forward, plan, setup.tiles, first_row=first, count=count)) as bands,
        ):
            for _, probs in bands:
                results.note_damage(picture.damage)  # before the rows count, for they are not read again
                results.add(probs)
    results.note_damage(picture.damage)
    return picture.height * picture.width / 1e6 * (1 - first / height)


def frame_of(name: str, picture: Picture, plan: Plan) -> Frame:
    """The raster of the results."""
    slide = picture.slide
    scale = 1.0 if plan.full_size else picture.scale
    mpp = (slide.mpp_xy[0] * scale, slide.mpp_xy[1] * scale) if slide.mpp_xy else None
    return Frame(name, plan.height, plan.width, scale, mpp, slide.geo)


@contextmanager
def progress(name: str, picture: Picture, rows_done: int) -> Iterator[Callable[[int], None]]:
    """A bar in megapixels; yields the function that counts pixels."""
    total = picture.height * picture.width / 1e6
    with tqdm(
        total=round(total, 2),
        initial=round(rows_done * picture.width / 1e6, 2),
        desc=name[:40],
        unit="MP",
        leave=False,
        disable=None,
        bar_format="{l_bar}{bar}| {n:.1f}/{total:.1f} MP [{elapsed}<{remaining}, {rate_fmt}]",
    ) as bar:
        yield lambda pixels: bar.update(pixels / 1e6) and None


def pixels_seen(setup: Setup, pair: Pair) -> float:
    """Pixels of all views of all tiles of an image; 0 when it cannot be read, which is said when its turn comes.

    Pictures that must be decoded to be planned are judged by the size in their headers.
    """
    config, options = setup.configs[0], tiles_for(setup, pair)
    in_memory = config.preprocess or (pair.image.suffix.lower() in PILLOW_SUFFIXES and not options.tissue)
    if config.geometry.kind == "resize":
        return 1e6 * megapixels_seen(config, 0)
    if in_memory:
        reduction = setup.read.reduce or config.geometry.reduction
        geometry = replace(
            config.geometry, reduction=reduction, tile=options.tile, overlap=options.overlap, tta=options.tta
        )
        return 1e6 * megapixels_seen(replace(config, geometry=geometry), count_pixels(pair.image))
    try:
        with Picture(pair, setup.configs, setup.read) as picture:
            plan = plan_picture(picture, options)
    except (OSError, ValueError, RuntimeError):
        return 0
    return plan.tiles * plan.rows.tile * plan.cols.tile * len(TTA[options.tta])
