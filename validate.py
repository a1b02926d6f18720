"""Measure a checkpoint on a labelled split, and write its masks, probabilities and plots.

Example:
    python validate.py -d data/sample/val -cd logs/sample
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cli

if TYPE_CHECKING:  # what these load would make --help wait for seconds
    import numpy as np

    from checkpoint import ModelConfig
    from evaluation import Prediction
    from object_metrics import ObjectScores
    from outputs import Outputs
    from pairing import Listing, Pair
    from postprocess import Filters
    from slide_scoring import SlidePrediction


def build_parser() -> argparse.ArgumentParser:
    """Flags of validate.py."""
    parser = cli.make_parser("Measure a checkpoint on a labelled split.")
    cli.add_checkpoint_args(parser)
    cli.add_split_args(parser, val_share=None)
    cli.add_threshold_args(parser)
    cli.add_run_args(parser, batch=None)
    cli.add_backend_args(parser)
    cli.add_score_args(parser)
    cli.add_log_args(parser)
    cli.add_tile_args(parser)
    cli.add_filter_args(parser)
    add_output_args(parser)
    return parser


def add_output_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags about what is scored and written."""
    group = parser.add_argument_group("data and outputs")
    group.add_argument(
        "-d", "--dataset-dir", type=Path, required=True, metavar="DIR", help="split folder, or a root (with --split)"
    )
    group.add_argument("--split", choices=("train", "val", "test"), help="part of a root; of a flat one chosen by name")
    group.add_argument("-o", "--output-dir", type=Path, metavar="DIR", help="default <run>/<parent>_<split>_thres_<t>")
    cli.add_switch(group, "--plots", help="write pictures of image, prediction, truth, difference")
    cli.add_switch(group, "--only-plots", help="write plots and no masks")
    cli.add_switch(group, "--vis", help="write plots and show each on the screen")
    cli.add_switch(group, "--binary", help="also write masks of 0 and 255 (one class)")
    cli.add_switch(group, "--raw", help="also write probabilities, 16 bit, 65535 is 1")
    cli.add_switch(group, "--com", "--calc-only-metrics", help="write nothing but the metrics")
    group.add_argument("--metrics-json", type=Path, metavar="FILE", help="where to write all metrics as JSON")
    cli.add_switch(group, "--objects", help="also score objects: F1 at IoU 0.5 to 0.95, counts, sizes")
    cli.add_switch(group, "--cldice", help="also score centre lines (thin structures, one class)")
    cli.add_tissue_arg(group)


@dataclass
class ExtraScores:
    """Object and centre-line scores, which need whole label maps; both are off unless asked for."""

    objects: bool
    cldice: bool
    object_sums: ObjectScores | None = None
    lines: list[float] = field(default_factory=list)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, find checkpoint and files, predict, print the table."""
    parser = build_parser()
    args = cli.parse(parser, argv)
    with cli.plain_errors(parser):
        from backends import load_config, load_forward, megapixels_seen, pick_device
        from checkpoint import find_checkpoint

        device = pick_device(args.device, args.cpu, args.check_path)
        path = args.check_path or find_checkpoint(args.check_dir)
        config = load_config(path)
        print(f"checkpoint {path}: {config.architecture} {config.encoder}, {config.geometry.kind}; device: {device}")
        threshold = cli.pick_threshold(args.thres, config.thresholds)
        if config.num_logits > 1 and threshold != 0.5:
            raise cli.UsageError(
                f"-t {threshold:g} is for one class; of several the likeliest wins, without a threshold"
            )
        config = with_overrides(config, args)
        listing = find_files(args, config)
        folder = args.output_dir or default_output(path, listing, args.split, threshold)
        outputs = choose_outputs(args, folder, config)
        failures, pixels = check_files(listing, config)
        work = megapixels_seen(config, pixels, len(listing.pairs))
        _, forward, note = load_forward(path, device, backend=args.backend, megapixels=work)
        print(f"backend: {note}")
        summary = validate(listing, config, forward, args, outputs, threshold)
        if summary:
            report(summary, args, path, folder)
        else:
            print(f"no gt/ or masks/ in {listing.folder}: predicted without metrics, threshold {threshold:g}")
        if has_results(summary, outputs):
            print(f"results in {folder}")
        for message in failures:
            print(f"failed: {message}")
    if failures:
        parser.exit(1, f"{parser.prog}: error: {len(failures)} findings, see the lines above; the rest is done\n")


def has_results(summary: dict[str, Any] | None, outputs: Outputs) -> bool:
    """Whether there is something to look at: a score, or files of the predictions."""
    return is_scored(summary) or outputs.masks or outputs.binary or outputs.raw or outputs.plots


def is_scored(summary: dict[str, Any] | None) -> bool:
    """Whether a pixel counted: without masks none does, nor where the truth is 255 or nothing could be decoded."""
    return summary is not None and summary["pixels"] > 0


def with_overrides(config: ModelConfig, args: argparse.Namespace) -> ModelConfig:
    """The checkpoint's description with what the flags change, said aloud where it changes the result."""
    from predictor import geometry_from_flags

    geometry, notes = geometry_from_flags([config], args)
    for note in notes:
        print(f"warning: {note}")
    tissue = config.tissue if args.tissue == "auto" else args.tissue
    config = replace(config, geometry=geometry, tissue=tissue)
    return config.with_tile_batch(args.batch) if args.batch else config


def find_files(args: argparse.Namespace, config: ModelConfig) -> Listing:
    """Images, masks and what belongs to them, as the checkpoint needs them."""
    from pairing import SPLITS, DatasetError, FileOptions, find_split

    if args.split is None and args.val_share is not None:
        raise cli.UsageError("--val-share chooses the part that --split val scores: give --split val too")
    if args.split is None and args.dataset_dir.resolve().name not in SPLITS:
        print("note: every image of the folder is scored; --split val takes the part that training kept for validation")

    options = FileOptions(
        add_dirs=config.add_dirs,
        roi_dir=args.roi_dir,
        ids=args.ids,
        val_share=config.val_share if args.val_share is None else args.val_share,
        group_pattern=args.group_pattern or config.group_pattern,
    )
    if args.roi_dir or not config.roi_dir:
        return find_split(args.dataset_dir, args.split, options)
    try:
        return find_split(args.dataset_dir, args.split, replace(options, roi_dir=config.roi_dir))
    except DatasetError as error:
        listing = find_split(args.dataset_dir, args.split, options)
        print(f"warning: {error}; all pixels count, though the network was trained on that region")
        return listing


def check_files(listing: Listing, config: ModelConfig) -> tuple[list[str], int]:
    """Leave out pairs that cannot be read or do not fit, and say how the images differ from the training's.

    Returns:
        What is wrong with those left out, and how many pixels the network will see.

    Raises:
        DatasetError: nothing is left.
    """
    from classes import ClassMap, list_labels
    from normalisation import scene_warnings
    from pairing import DatasetError
    from scan import label_counts, name_labels, scan_pairs
    from slide_windows import SlideOptions

    classes = ClassMap.from_config(config)
    failures, good = list(listing.errors), []
    for item in scan_pairs(listing.pairs, steps=config.preprocess, slides=SlideOptions.from_config(config)):
        errors = name_labels([item], classes.annotations) or pair_problems(item, config, classes)
        failures += errors
        if not errors:
            good.append(item)
    if not good:
        listed = "\n".join(f"  - {message}" for message in failures)
        raise DatasetError(f"no image of {listing.folder} can be used:\n{listed}")
    for message in scene_warnings(good, config):
        print(f"warning: {message}")
    known = {0, classes.ignore_label, *classes.labels}
    unknown = sorted(label_counts(good).keys() - known) if classes.labels else []
    if unknown:
        shown = list_labels(unknown)
        print(f"warning: the masks hold labels the network does not know, they count as background: {shown}")
    listing.pairs = [item.pair for item in good]
    sizes = [config.geometry.size if config.geometry.kind == "resize" else item.layers[0].size for item in good]
    return failures, sum(height * width for height, width in sizes)


def pair_problems(item: Any, config: ModelConfig, classes: Any) -> list[str]:
    """What keeps one scanned pair from being scored: unreadable, another size, number of channels, or labels."""
    import numpy as np

    from pairing import DatasetError
    from scan import find_problems
    from slide_windows import SlideOptions, is_slide

    errors = list(dict.fromkeys(find_problems([], [item])[0]))
    if not errors and config.geometry.kind != "crops" and is_slide(item.pair, SlideOptions.from_config(config)):
        errors = [f"{item.pair.image} is a slide, the network sees whole images resized: train one with --crops"]
    expected = len(config.channels) - len(config.add_dirs)
    if not errors and item.channels != expected:
        errors = [f"{item.pair.image} has {item.channels} channels, the network takes {expected}"]
    if not errors and item.mask:
        try:
            classes.encode(np.array([[value for value, _ in item.mask.labels]], np.uint32), item.pair.mask)
        except DatasetError as error:
            errors = [str(error)]
    return errors


def default_output(path: Path, listing: Listing, split: str | None, threshold: float) -> Path:
    """<checkpoint's folder>/<parent>_<split>_thres_<t>, from resolved paths."""
    folder = listing.folder.resolve()
    name = f"{folder.parent.name}_{folder.name}" + (f"_{split}" if split and folder.name != split else "")
    return path.resolve().parent / f"{name}_thres_{threshold:g}"


def choose_outputs(args: argparse.Namespace, folder: Path, config: ModelConfig) -> Outputs:
    """What to write, from the flags.

    Raises:
        cli.UsageError: a flag that is for one class, and the checkpoint has several.
    """
    from outputs import Outputs

    for flag, given in (("--binary", args.binary), ("--cldice", args.cldice), ("--objects", args.objects)):
        if given and config.num_logits > 1:
            raise cli.UsageError(f"{flag} is for one class, the checkpoint has {', '.join(config.class_names)}")
    if args.com:
        return Outputs(folder, masks=False)
    plots = args.plots or args.only_plots or args.vis
    return Outputs(folder, not args.only_plots, args.binary, args.raw, plots, args.vis)


def validate(
    listing: Listing,
    config: ModelConfig,
    forward: Callable[[np.ndarray], np.ndarray],
    args: argparse.Namespace,
    outputs: Outputs,
    threshold: float,
) -> dict[str, Any] | None:
    """Predict every image, write what was asked for, return the summary of scores; None without masks."""
    import baselines
    import evaluation
    from classes import ClassMap
    from dataset import EvaluationSet
    from outputs import write_tables
    from results import filters_of

    scorer = evaluation.build_scorer(config, threshold=threshold, empty=args.empty)
    extra = ExtraScores(args.objects, args.cldice)
    filters = filters_of(args)
    data = EvaluationSet(listing.pairs, ClassMap.from_config(config), config, with_images=outputs.plots)
    predictions = evaluation.predict_samples(forward, data, workers=args.workers, description="predicting")
    seen = write_outputs(predictions, config, outputs, threshold, extra, filters)
    result = evaluation.evaluate(seen, scorer, keep_worst=args.worst)
    if not listing.has_masks:
        return None
    summary = {**result.summary, "checkpoint_thresholds": config.thresholds, **extra_summary(extra)}
    if any(data.slides) and (args.baselines or args.objects or args.cldice):
        print("slides: baselines are left out; objects and centre lines are scored on the other images alone")
    elif args.baselines and config.num_logits == 1:
        summary["baselines"] = baselines.score_baselines(data, empty=args.empty)
    elif args.baselines:
        print(baselines.LEFT_OUT)
    write_tables(outputs.folder, scorer, summary, args.decimal)
    if is_scored(summary):
        log_tensorboard(args, outputs.folder, summary, evaluation.worst_panels(result.worst, config, threshold))
    return summary


def write_outputs(
    predictions: Iterable[Prediction | SlidePrediction],
    config: ModelConfig,
    outputs: Outputs,
    threshold: float,
    extra: ExtraScores,
    filters: Filters,
) -> Iterator[Prediction | SlidePrediction]:
    """Decide and filter, write masks, probabilities and plots of each prediction as it passes."""
    from evaluation import build_scorer
    from outputs import decide, write_plot, write_prediction
    from postprocess import Filters, filter_mask
    from slide_scoring import Filtering, SlidePrediction

    for prediction in predictions:
        if isinstance(prediction, SlidePrediction):
            bands = write_slide(prediction, config, outputs, threshold, filters)
            waiting = outputs.folder / f".{prediction.pair.name}.scoring"  # not in /tmp, which may be memory
            filtering = None if filters == Filters() else Filtering(filters, waiting)
            yield replace(prediction, bands=bands, filtering=filtering)
            for message in prediction.picture.damage:
                print(f"warning: {message}; its pixels do not count")
            continue
        pair, probs, mask = prediction.sample.pair, prediction.probs, prediction.mask
        pred = filter_mask(decide(probs, threshold), filters)
        write_prediction(outputs, config, pair.name, probs, pred)
        if outputs.plots:
            assert prediction.sample.image is not None, "plots need EvaluationSet(with_images=True)"
            scores = None if mask is None else build_scorer(config).update_pred(pair.name, pred, mask)
            image = prediction.sample.image.numpy()
            write_plot(outputs, config, pair.name, image=image, mask=mask, pred=pred, probs=probs, scores=scores)
        if mask is not None:
            score_extra(extra, pair, pred, mask, instances=config.mask_threshold is None)
        yield replace(prediction, pred=pred)


def write_slide(
    prediction: SlidePrediction, config: ModelConfig, outputs: Outputs, threshold: float, filters: Filters
) -> Iterator[tuple[int, np.ndarray, np.ndarray | None]]:
    """Hand on the bands of a slide and write what predict.py would: mask, probabilities (--raw), overlay (--plots)."""
    import shutil

    from predictor import thumbnail
    from results import Frame, ResultOptions, Results

    wanted = {"mask": outputs.masks, "prob": outputs.raw, "overlay": outputs.plots}
    kinds = tuple(kind for kind, given in wanted.items() if given)
    if not kinds:
        yield from prediction.bands
        return
    picture, name = prediction.picture, prediction.pair.name
    slide, scale = picture.slide, picture.scale
    mpp = None if slide.mpp_xy is None else (slide.mpp_xy[0] * scale, slide.mpp_xy[1] * scale)
    frame = Frame(name, picture.height, picture.width, scale, mpp, slide.geo)
    shutil.rmtree(outputs.folder / f".{name}.partial", ignore_errors=True)  # of a run that was killed
    options = ResultOptions(outputs.folder, kinds, threshold=threshold, filters=filters)
    with Results(frame, config, options, "validation") as results:
        for band in prediction.bands:
            results.add(band[1])
            yield band
        results.finish(lambda step: thumbnail(slide, frame.height, frame.width, step))
        results.remove()


def score_extra(extra: ExtraScores, pair: Pair, pred: np.ndarray, mask: np.ndarray, *, instances: bool = True) -> None:
    """Add the object and centre-line scores of one image.

    Args:
        instances: the mask file may be an instance map; False for grey masks under a threshold.
    """
    from image_io import IGNORE_INDEX
    from object_metrics import cldice, object_scores

    counted = mask != IGNORE_INDEX
    found, truth = (pred > 0) & counted, (mask > 0) & counted
    if extra.cldice:
        value = cldice(found, truth)
        if value is not None:
            extra.lines.append(value)
    if extra.objects:
        scores = object_scores(components(found), true_objects(pair, truth) if instances else components(truth))
        extra.object_sums = scores if extra.object_sums is None else extra.object_sums + scores


def components(inside: np.ndarray) -> np.ndarray:
    """Label map (H, W) int32 of 4-connected components."""
    import cv2
    import numpy as np

    return cv2.connectedComponents(inside.astype(np.uint8), connectivity=4)[1]


def true_objects(pair: Pair, truth: np.ndarray) -> np.ndarray:
    """Label map of the truth: the mask file's own if it is an instance map, else its components."""
    import numpy as np

    from image_io import read_mask

    values = read_mask(pair.mask) if pair.mask else truth
    labels = np.where(truth, values, 0).astype(np.int64)
    return labels if len(np.unique(labels)) > 2 else components(truth)


def extra_summary(extra: ExtraScores) -> dict[str, Any]:
    """Object scores summed over images, mean clDice."""
    result: dict[str, Any] = {}
    if extra.object_sums:
        result["objects"] = extra.object_sums.summary()
    if extra.cldice:
        result["cldice"] = sum(extra.lines) / len(extra.lines) if extra.lines else None
    return result


def log_tensorboard(args: argparse.Namespace, folder: Path, summary: dict[str, Any], panels: list[np.ndarray]) -> None:
    """Scores, the threshold sweep and the worst images, beside the runs of training."""
    from torch.utils.tensorboard import SummaryWriter

    from run_folder import shrink_panel

    name = args.exp_name or f"validate_{folder.parent.name}_{folder.name}"
    with SummaryWriter(str(args.log_dir / name)) as writer:
        for key in ("iou", "dice", "precision", "recall", "accuracy", "auc"):
            if summary[key] is not None:
                writer.add_scalar(f"validate/{key}", summary[key])
        for row in summary["per_class"]:
            if row["iou"] is not None:
                writer.add_scalar(f"validate class iou/{row['name']}", row["iou"])
        for row in summary["sweep"]:
            writer.add_scalar("validate/iou by threshold in percent", row["iou"] or 0.0, round(100 * row["threshold"]))
        for place, panel in enumerate(panels):
            writer.add_image(f"validate worst/{place + 1}", shrink_panel(panel), dataformats="HWC")


def objects_line(scores: dict[str, Any]) -> str:
    """The object scores that matter most; all of them are in _metrics.json."""
    from metrics import score_text

    by_limit = ", ".join(f"{score_text(row['f1'])} at IoU {row['iou']:g}" for row in scores["at"][::5])
    found, true, mean = scores["predicted"], scores["true"], score_text(scores["f1"])
    return f"objects: {found} predicted, {true} true; F1 {by_limit}, mean of 0.5 to 0.95 {mean}"


def report(summary: dict[str, Any], args: argparse.Namespace, path: Path, folder: Path) -> None:
    """Print the scores, and write them as JSON."""
    from baselines import baseline_lines
    from image_io import write_text
    from metrics import score_table, score_text

    print(score_table(summary))
    for line in baseline_lines(summary.get("baselines", {})):
        print(line)
    if "objects" in summary:
        print(objects_line(summary["objects"]))
    if "cldice" in summary:
        print(f"clDice {score_text(summary['cldice'])}")
    text = json.dumps({"checkpoint": str(path), **summary}, indent=2, ensure_ascii=False) + "\n"
    write_text(args.metrics_json or folder / "_metrics.json", text)
    if is_scored(summary):
        print(f"tensorboard --logdir {shlex.quote(str(args.log_dir))}")
    else:
        print("nothing is scored: no pixel counts; the masks are 255 throughout, or the images could not be decoded")


if __name__ == "__main__":
    main()
