"""Measure a checkpoint on a labelled split, and write its masks, probabilities and plots.

Example:
    python validate.py -d data/sample/val -cd logs/sample
"""

import argparse
import csv
import io
import json
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

import cli
from backends import load_forward
from checkpoint import Geometry, ModelConfig, find_checkpoint
from dataset import ClassMap, DatasetError, EvaluationSet, FileOptions, Listing, Pair, find_split
from image_io import IGNORE_INDEX, read_mask, write_image, write_mask, write_text
from metrics import ObjectScores, Scorer, cldice, object_scores, score_table
from plots import sample_panel
from scan import find_problems, scan_pairs, scene_warnings
from trainer import Prediction, build_scorer, decide, evaluate, predict_samples, score_baselines, worst_panels


def build_parser() -> argparse.ArgumentParser:
    """Flags of validate.py."""
    parser = cli.make_parser("Measure a checkpoint on a labelled split.")
    cli.add_checkpoint_args(parser)
    cli.add_split_args(parser, val_share=None)
    cli.add_threshold_args(parser)
    cli.add_run_args(parser, batch=None)
    cli.add_score_args(parser)
    cli.add_log_args(parser, exp_name="validate_<checkpoint>_<split>")
    group = parser.add_argument_group("data and outputs")
    group.add_argument(
        "-d", "--dataset-dir", type=Path, required=True, metavar="DIR", help="split folder, or a root (with --split)"
    )
    group.add_argument("--split", choices=("train", "val", "test"), help="part of a root; of a flat one chosen by name")
    group.add_argument("-o", "--output-dir", type=Path, metavar="DIR", help="default <run>/<parent>_<split>_thres_<t>")
    group.add_argument(
        "--plots", action=argparse.BooleanOptionalAction, default=False, help="image, prediction, truth, difference"
    )
    group.add_argument("--only-plots", action="store_true", help="write plots and no masks")
    group.add_argument("--vis", action="store_true", help="write plots and show each on the screen")
    group.add_argument("--binary", action="store_true", help="also write masks of 0 and 255 (one class)")
    group.add_argument("--raw", action="store_true", help="also write probabilities, 16 bit, 65535 is 1")
    group.add_argument("--com", "--calc-only-metrics", action="store_true", help="write nothing but the metrics")
    group.add_argument("--metrics-json", type=Path, metavar="FILE", help="where to write all metrics as JSON")
    group.add_argument(
        "--objects", action="store_true", help="also score objects: F1 at IoU 0.5 to 0.95, counts, sizes"
    )
    group.add_argument("--cldice", action="store_true", help="also score centre lines (thin structures, one class)")
    group.add_argument("--tile-size", type=cli.positive_int, metavar="S", help="another tile, or size to resize to")
    group.add_argument("--worst", type=cli.natural, default=4, metavar="N", help="worst images to show in TensorBoard")
    return parser


@dataclass(frozen=True)
class Outputs:
    """What is written for each image, and where."""

    folder: Path
    masks: bool = True
    binary: bool = False
    raw: bool = False
    plots: bool = False
    show: bool = False


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
        device = cli.pick_device(args.device, args.cpu)
        path = args.check_path or find_checkpoint(args.check_dir)
        config, forward = load_forward(path, device)
        config = with_overrides(config, args)
        listing = find_files(args, config)
        print(f"checkpoint {path}: {config.architecture} {config.encoder}, {config.geometry.kind}; device: {device}")
        failures = check_files(listing, config)
        threshold = cli.pick_threshold(args.thres, config.thresholds)
        folder = args.output_dir or default_output(path, listing, args.split, threshold)
        outputs = choose_outputs(args, folder, config, listing)
        summary = validate(listing, config, forward, args, outputs, threshold)
        if summary:
            report(summary, args, path, folder)
        else:
            print(f"no gt/ or masks/ in {listing.folder}: predicted without metrics")
        print(f"results in {folder}")
        for message in failures:
            print(f"failed: {message}")
    if failures:
        parser.exit(1, f"{len(failures)} files were left out\n")


def with_overrides(config: ModelConfig, args: argparse.Namespace) -> ModelConfig:
    """The checkpoint's description with what the flags change, said aloud where it changes the result."""
    geometry = config.geometry
    if args.tile_size and geometry.kind == "resize":
        side = -(-args.tile_size // config.stride) * config.stride
        geometry = Geometry("resize", (side, side))
        print(f"warning: the network was trained on images resized to {config.geometry.size}, now {geometry.size}")
    elif args.tile_size:
        geometry = replace(geometry, tile=args.tile_size, overlap=args.tile_size // 4, halo=args.tile_size // 16)
    return replace(config, geometry=geometry, batch=args.batch or config.batch)


def find_files(args: argparse.Namespace, config: ModelConfig) -> Listing:
    """Images, masks and what belongs to them, as the checkpoint needs them."""
    share = config.val_share if args.val_share is None else args.val_share
    options = FileOptions(
        add_dirs=config.add_dirs,
        roi_dir=args.roi_dir,
        ids=args.ids,
        val_share=share,
        group_pattern=args.group_pattern or config.group_pattern,
    )
    if args.roi_dir or not config.roi_dir:
        return find_split(args.dataset_dir, args.split, options)
    try:
        return find_split(args.dataset_dir, args.split, replace(options, roi_dir=config.roi_dir))
    except DatasetError as error:
        print(f"warning: {error}; all pixels count, though the network was trained on that region")
        return find_split(args.dataset_dir, args.split, options)


def check_files(listing: Listing, config: ModelConfig) -> list[str]:
    """Leave out pairs that cannot be read or do not fit, and say how the images differ from the training's.

    Raises:
        DatasetError: nothing is left.
    """
    facts = scan_pairs(listing.pairs, steps=config.preprocess)
    expected = len(config.channels) - len(config.add_dirs)
    failures = list(listing.errors)
    good = []
    for item in facts:
        errors = find_problems([], [item])[0]
        if not errors and item.channels != expected:
            errors = [f"{item.pair.image} has {item.channels} channels, the network takes {expected}"]
        failures += errors
        if not errors:
            good.append(item)
    if not good:
        listed = "\n".join(f"  - {message}" for message in failures)
        raise DatasetError(f"no image of {listing.folder} can be used:\n{listed}")
    for message in scene_warnings(good, config):
        print(f"warning: {message}")
    listing.pairs = [item.pair for item in good]
    return failures


def default_output(path: Path, listing: Listing, split: str | None, threshold: float) -> Path:
    """<checkpoint's folder>/<parent>_<split>_thres_<t>, from resolved paths."""
    folder = listing.folder.resolve()
    name = f"{folder.parent.name}_{folder.name}" + (f"_{split}" if split and folder.name != split else "")
    return path.resolve().parent / f"{name}_thres_{threshold:g}"


def choose_outputs(args: argparse.Namespace, folder: Path, config: ModelConfig, listing: Listing) -> Outputs:
    """What to write, from the flags.

    Raises:
        ValueError: --binary for several classes.
    """
    if args.binary and config.num_logits > 1:
        raise ValueError(f"--binary is for one class, the checkpoint has {', '.join(config.class_names)}; see masks/")
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
    scorer = build_scorer(config, threshold=threshold, empty=args.empty)
    extra = ExtraScores(args.objects, args.cldice)
    data = EvaluationSet(listing.pairs, ClassMap.from_config(config), config, with_images=outputs.plots)
    predictions = predict_samples(forward, data, batch=config.batch, workers=args.workers, description="predicting")
    seen = write_outputs(predictions, config, outputs, threshold, extra)
    result = evaluate(seen, scorer, keep_worst=args.worst)
    if not listing.has_masks:
        return None
    summary = {**result.summary, "checkpoint_thresholds": config.thresholds, **extra_summary(extra)}
    if args.baselines and config.num_logits == 1:
        summary["baselines"] = score_baselines(data, empty=args.empty)
    write_tables(outputs.folder, scorer, summary, args.decimal)
    log_tensorboard(args, outputs.folder, summary, worst_panels(result.worst, config, threshold))
    return summary


def write_outputs(
    predictions: Iterable[Prediction], config: ModelConfig, outputs: Outputs, threshold: float, extra: ExtraScores
) -> Iterator[Prediction]:
    """Write masks, probabilities and plots of each prediction as it passes."""
    for prediction in predictions:
        pair, probs = prediction.sample.pair, prediction.probs
        pred = decide(probs, threshold)
        if outputs.masks:
            write_mask(outputs.folder / "masks" / f"{pair.name}.png", label_values(pred, config))
        if outputs.binary:
            write_mask(outputs.folder / f"{pair.name}.png", pred * np.uint8(255))
        if outputs.raw:
            write_raw(outputs.folder / "raw", pair.name, probs)
        if outputs.plots:
            write_plot(prediction, pred, config, outputs)
        if prediction.mask is not None:
            score_extra(extra, pair, pred, prediction.mask)
        yield prediction


def label_values(pred: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Class indices (H, W) as the mask labels that training used; 255 for the object of `nonzero`."""
    labels = list(config.labels) or [255]
    values = labels if 0 in config.labels else [0, *labels]
    return np.array(values, np.uint8 if max(values) < 256 else np.uint16)[pred]


def write_raw(folder: Path, name: str, probs: np.ndarray) -> None:
    """Probabilities (K, H, W) as 16 bit, 65535 is 1; one class as PNG, several as bands of a TIFF."""
    scaled = np.round(np.clip(probs, 0, 1) * 65535).astype(np.uint16).transpose(1, 2, 0)
    write_image(folder / f"{name}{'.png' if scaled.shape[2] == 1 else '.tif'}", scaled)


def write_plot(prediction: Prediction, pred: np.ndarray, config: ModelConfig, outputs: Outputs) -> None:
    """One panel: image, prediction, truth and difference, with IoU and Dice in the title and in the file name."""
    name, mask = prediction.sample.pair.name, prediction.mask
    image = prediction.sample.image
    assert image is not None, "plots need EvaluationSet(with_images=True)"
    title = stem = name
    if mask is not None:
        single = Scorer(config.class_names, binary=config.num_logits == 1)
        scores = single.update_pred(name, pred, mask)
        title += f"  IoU {_show(scores['iou'])}  Dice {_show(scores['dice'])}"
        stem += f"_iou_{_show(scores['iou'])}_acc_{_show(scores['accuracy'])}"
    panel = sample_panel(image.numpy(), mask, pred, prediction.probs, config.class_names, title)
    write_image(outputs.folder / "plots" / f"{stem}.png", panel)
    if outputs.show:
        from PIL import Image

        Image.fromarray(panel).show(title)


def _show(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"


def score_extra(extra: ExtraScores, pair: Pair, pred: np.ndarray, mask: np.ndarray) -> None:
    """Add the object and centre-line scores of one image."""
    counted = mask != IGNORE_INDEX
    found, truth = (pred > 0) & counted, (mask > 0) & counted
    if extra.cldice:
        value = cldice(found, truth)
        if value is not None:
            extra.lines.append(value)
    if extra.objects:
        scores = object_scores(components(found), true_objects(pair, truth))
        extra.object_sums = scores if extra.object_sums is None else extra.object_sums + scores


def components(inside: np.ndarray) -> np.ndarray:
    """Label map (H, W) int32 of 4-connected components."""
    import cv2

    return cv2.connectedComponents(inside.astype(np.uint8), connectivity=4)[1]


def true_objects(pair: Pair, truth: np.ndarray) -> np.ndarray:
    """Label map of the truth: the mask file's own if it is an instance map, else its components."""
    values = read_mask(pair.mask) if pair.mask else truth
    labels = np.where(truth, values, 0).astype(np.int64)
    return labels if len(np.unique(labels)) > 2 else components(truth)


def extra_summary(extra: ExtraScores) -> dict[str, Any]:
    """Object scores summed over images, mean clDice."""
    result: dict[str, Any] = {}
    if extra.object_sums:
        result["objects"] = extra.object_sums.summary()
    if extra.cldice:
        result["cldice"] = float(np.mean(extra.lines)) if extra.lines else None
    return result


def write_tables(folder: Path, scorer: Scorer, summary: dict[str, Any], decimal: str) -> None:
    """_metrics.csv with a row for each image, their mean and the pooled scores; _thresholds.csv for one class."""
    keys = ("iou", "dice", "precision", "recall", "accuracy")
    rows = [{"file": row["name"], **row} for row in scorer.rows()]
    rows.append({"file": "mean_vals", **summary["per_image_mean"]})
    rows.append({"file": "pooled", **summary})
    write_text(folder / "_metrics.csv", _csv(["file", *keys], rows, decimal))
    if summary["sweep"]:
        write_text(folder / "_thresholds.csv", _csv(["threshold", *keys], summary["sweep"], decimal))


def _csv(columns: Sequence[str], rows: Sequence[dict[str, Any]], decimal: str) -> str:
    text = io.StringIO()
    writer = csv.writer(text, delimiter=";", lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        cells = [row[column] for column in columns]
        shown = [f"{cell:.4f}" if isinstance(cell, float) else "" if cell is None else str(cell) for cell in cells]
        numbers = [cell.replace(".", ",") for cell in shown[1:]] if decimal == "comma" else shown[1:]
        first = shown[0].replace(".", ",") if decimal == "comma" and isinstance(cells[0], float) else shown[0]
        writer.writerow([first, *numbers])
    return text.getvalue()


def log_tensorboard(args: argparse.Namespace, folder: Path, summary: dict[str, Any], panels: list[np.ndarray]) -> None:
    """Scores, the threshold sweep and the worst images, beside the runs of training."""
    from torch.utils.tensorboard import SummaryWriter

    name = args.exp_name or f"validate_{folder.parent.name}_{folder.name}"
    with SummaryWriter(str(args.log_dir / name)) as writer:
        for key in ("iou", "dice", "precision", "recall", "accuracy", "auc"):
            if summary[key] is not None:
                writer.add_scalar(f"validate/{key}", summary[key])
        for row in summary["per_class"]:
            if row["iou"] is not None:
                writer.add_scalar(f"validate iou by class/{row['name']}", row["iou"])
        for row in summary["sweep"]:
            writer.add_scalar("validate/iou by threshold in percent", row["iou"] or 0.0, round(100 * row["threshold"]))
        for place, panel in enumerate(panels):
            writer.add_image(f"validate worst/{place + 1}", panel, dataformats="HWC")


def report(summary: dict[str, Any], args: argparse.Namespace, path: Path, folder: Path) -> None:
    """Print the scores, and write them as JSON."""
    print(score_table(summary))
    for name, scores in summary.get("baselines", {}).items():
        print(f"for comparison: {name} IoU {scores['iou']:.4f} Dice {scores['dice']:.4f}")
    for name in ("objects", "cldice"):
        if name in summary:
            print(f"{name}: {json.dumps(summary[name])}")
    text = json.dumps({"checkpoint": str(path), **summary}, indent=2, ensure_ascii=False) + "\n"
    write_text(args.metrics_json or folder / "_metrics.json", text)
    print(f"tensorboard --logdir {shlex.quote(str(args.log_dir))}")


if __name__ == "__main__":
    main()
