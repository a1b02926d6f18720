"""Predict images, slides and videos of any size: masks, probabilities, overlays, label maps, polygons, run lengths.

Examples:
    python predict.py -cd logs/myrun -i picture.png
    python predict.py -cd logs/myrun -dir slides --mpp 0.5 --tissue saturation --save mask,geojson
    python predict.py -cd logs/myrun -i slide.svs --dry-run
    python predict.py -cd logs/myrun -i film.mp4 --fps 5 --save mask,video

An image is read window by window and leaves row band by row band, so its height does not matter; what the network sees
is what it saw in training (statistics, scale, tile). A run that was killed goes on inside the slide. Files that cannot
be read are named, the rest is done, and the exit status is 1.
"""

import argparse
import hashlib
import json
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cli

if TYPE_CHECKING:
    from checkpoint import ModelConfig
    from pairing import Pair
    from picture_prediction import Engine, Setup
    from video_results import Clip, VideoSetup

TISSUE_RULES = ("saturation", "otsu")
ENOUGH_MEGAPIXELS = 2000.0  # no network predicts that much on a CPU before a faster one is prepared
INTERRUPTED = (
    "the same command goes on where it stopped; a picture whose results become PNG begins anew, so does --save video"
)
KINDS = ("mask", "prob", "overlay", "labels", "geojson", "rle")
MOVING = ("video", "gif")  # of videos alone: all frames together


def build_parser() -> argparse.ArgumentParser:
    """Flags of predict.py."""
    from annotation.frame_options import add_frame_args

    parser = cli.make_parser("Predict images, slides and videos of any size: masks, overlays, polygons.")
    cli.add_checkpoint_args(parser, several=True)
    cli.add_threshold_args(parser)
    cli.add_run_args(parser, batch=None, predicts=True)
    cli.add_backend_args(parser)
    cli.add_log_args(parser, tables=False)
    cli.add_filter_args(parser)
    add_image_args(parser)
    add_scale_args(parser)
    cli.add_tile_args(parser)
    cli.add_result_args(parser, kinds=(*KINDS, *MOVING))
    add_frame_args(parser)
    add_other_args(parser)
    return parser


def add_image_args(parser: argparse.ArgumentParser) -> None:
    """Add where the images are."""
    group = parser.add_argument_group("images").add_mutually_exclusive_group(required=True)
    group.add_argument(
        "-i", "--img-path", nargs="+", metavar="PATH", help="images, videos, folders or globs; a number is a camera"
    )
    group.add_argument("-dir", "--data-dir", nargs="+", metavar="PATH", help="the same: folders, files or globs")
    group.add_argument(
        "-d", "--dataset-dir", type=Path, metavar="DIR", help="folder with images/ and the folders of extra channels"
    )


def add_scale_args(parser: argparse.ArgumentParser) -> None:
    """Add at which scale slides are read, and what is done with what cannot be."""
    group = parser.add_argument_group("scale")
    scale = group.add_mutually_exclusive_group()
    scale.add_argument("--reduce", type=cli.positive_float, metavar="X", help="read X times smaller, X >= 1")
    scale.add_argument("--level", type=cli.natural, metavar="N", help="read this level of a pyramid; 0 is the largest")
    scale.add_argument("--mpp", type=cli.positive_float, metavar="UM", help="read at so many micrometres per pixel")
    cli.add_switch(group, "--full-size", help="enlarge the result to the slide's own pixels")
    cli.add_decoded_arg(group)
    group.add_argument(
        "--fill", type=float, metavar="V", help="value of pixels that cannot be decoded; default: the training's mean"
    )
    cli.add_tissue_arg(group)


def add_other_args(parser: argparse.ArgumentParser) -> None:
    """Add what belongs to this command alone."""
    group = parser.add_argument_group("before and beside")
    cli.add_switch(group, "--dry-run", help="say what would be done: windows, memory, disk, expected time")
    group.add_argument(
        "--max-frames",
        type=cli.positive_int,
        metavar="N",
        help="take N frames of each video; a camera ends with Ctrl-C",
    )
    group.add_argument(
        "--thumbnails", type=cli.natural, default=8, metavar="N", help="pictures with overlays in TensorBoard"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, find checkpoint and images, predict each, print what came out."""
    parser = build_parser()
    args = cli.parse(parser, argv)
    with cli.plain_errors(parser, interrupted=INTERRUPTED):
        failures = run(args)
    cli.exit_with_findings(parser, failures)


def run(args: argparse.Namespace) -> list[str]:
    """Predict all images; return what went wrong."""
    cli.share_cores()

    from backends import load_config, pick_device
    from result_record import merge_run_lengths, write_description

    device = pick_device(args.device, args.cpu, args.check_path)
    paths = find_checkpoints(args)
    configs = [load_config(path) for path in paths]
    check_ensemble(paths, configs)
    pairs, clips, failures = find_inputs(args, configs[0])
    setup = build_setup(args, paths, configs, [*(pair.image for pair in pairs), *(clip.path for clip in clips)])
    videos = build_videos(setup, args, pairs, clips)
    if args.dry_run:
        engine = load_engine(setup, args, paths, lambda: sum_megapixels(setup, pairs, videos, clips), device)
        return failures + estimate(setup, engine, pairs, videos, clips)
    done, digests = finished_before(setup, pairs, videos, clips, overwrite=args.overwrite)
    for name in sorted(done):
        print(f"{name}: already done")
    made, left = 0, [pair for pair in pairs if pair.name not in done]
    waiting = [clip for clip in clips if clip.name not in done]
    if left or waiting:
        engine = load_engine(setup, args, paths, lambda: sum_megapixels(setup, left, videos, waiting), device)
        write_description(setup.results.folder, configs[0], setup.results.threshold)
        with open_writer(args, setup.results.folder) as writer:
            made, failed = predict_all(setup, engine, left, args.thumbnails, writer)
            videos = replace(videos, forward=engine.forward, engine=engine.name, writer=writer)
            more, worse = predict_clips(videos, waiting, digests)
        made, failures = made + more, failures + failed + worse
        for line in setup.told.summary():
            print(line)
    if done or made:
        if "rle" in args.save:
            merge_run_lengths(setup.results.folder)
        print(f"results in {setup.results.folder}")
    return failures


# ----------------------------------------------------------------------------------------------------------------------
# What is predicted, with what


def find_checkpoints(args: argparse.Namespace) -> list[Path]:
    """The checkpoint of the flags, or with --ensemble all of a folder."""
    from checkpoint import find_checkpoint, list_checkpoints

    if not args.ensemble:
        return [args.check_path or find_checkpoint(args.check_dir)]
    if not args.check_dir:
        raise cli.UsageError("--ensemble averages the checkpoints of a folder: give it with -cd DIR")
    return list_checkpoints(args.check_dir)


def check_ensemble(paths: Sequence[Path], configs: Sequence["ModelConfig"]) -> None:
    """Refuse networks that do not answer the same question about the same pixels."""
    for name in ("class_names", "labels", "channels", "add_dirs", "preprocess", "geometry"):
        for path, config in zip(paths, configs, strict=True):
            first, other = getattr(configs[0], name), getattr(config, name)
            if first != other:
                raise cli.UsageError(
                    f"--ensemble: {paths[0]} has {name} {first}, {path} has {other}; average networks that were "
                    "trained on the same classes, channels and geometry"
                )


def find_inputs(args: argparse.Namespace, config: "ModelConfig") -> tuple[list["Pair"], list["Clip"], list[str]]:
    """The images of the flags, with their extra channels, the videos, and what is missing; names are of the results.

    Raises:
        cli.UsageError: nothing to predict, two of one name, or extra channels without -d.
    """
    from annotation.video import VIDEO_SUFFIXES
    from image_io import file_stem
    from pairing import Pair
    from pictures import list_pictures
    from predictor import pair_channels
    from video_prediction import check_names, find_clips
    from video_results import Clip

    failures, clips = list[str](), list[Clip]()
    if args.dataset_dir:
        pairs, failures = pair_channels(args.dataset_dir, config.add_dirs)
    elif config.add_dirs:
        folders = " ".join(config.add_dirs)
        raise cli.UsageError(f"the network also takes the channels {folders}: give -d DIR with images/ and {folders}")
    else:
        clips, words = find_clips(args.img_path or args.data_dir)
        found = list_pictures(words, VIDEO_SUFFIXES)
        videos = [path for path in found if path.suffix.lower() in VIDEO_SUFFIXES]
        clips += [Clip(file_stem(path), path) for path in videos]
        pairs = [Pair(file_stem(path), path) for path in found if path not in set(videos)]
    if not pairs and not clips:
        listed = "\n".join(f"  - {message}" for message in failures)
        raise cli.UsageError(f"{args.dataset_dir} holds no image with all its channels\n{listed}".rstrip())
    check_names(pairs, clips)
    return pairs, clips, failures


def build_setup(
    args: argparse.Namespace, paths: Sequence[Path], configs: list["ModelConfig"], inputs: Sequence[Path]
) -> "Setup":
    """Turn flags into options; says what they change about the way of the checkpoint."""
    from picture_prediction import Setup
    from predictor import ReadOptions, TileOptions, geometry_from_flags
    from results import ResultOptions, filters_of

    config = configs[0]
    threshold = cli.pick_threshold(args.thres, config.thresholds, config.num_logits)
    if args.reduce and args.reduce < 1:
        raise cli.UsageError(f"--reduce {args.reduce:g} would enlarge the image; expected 1 or more")
    if config.geometry.kind == "resize" and args.tissue in TISSUE_RULES:
        raise cli.UsageError("--tissue is for networks trained on crops; this one sees whole images resized")
    geometry, notes = geometry_from_flags(configs, args)
    for note in notes:
        print(f"warning: {note}")
    configs = [replace(each, geometry=geometry) for each in configs]
    batch = args.batch or min(each.tile_batch for each in configs)
    tiles = replace(TileOptions.from_config(configs[0]), batch=batch, tissue=args.tissue, ahead=args.workers)
    folder = args.output_dir or default_output(paths[0], inputs[0], threshold)
    read = ReadOptions(args.reduce, args.level, args.mpp, args.max_decoded_gb, args.fill)
    kinds = tuple(kind for kind in args.save if kind in KINDS)
    results = ResultOptions(folder, kinds, args.format, threshold, filters_of(args), args.decimal, args.geo)
    choices = [
        asdict(read),
        asdict(replace(tiles, ahead=0)),
        asdict(replace(results, folder=Path(), kinds=())),
        asdict(geometry),
        args.full_size,
        args.backend,
        args.amp,
    ]
    content = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    digest = hashlib.sha256(json.dumps([content, choices], default=str).encode()).hexdigest()
    return Setup(configs, read, tiles, results, args.full_size, digest, print)


def build_videos(
    setup: "Setup", args: argparse.Namespace, pairs: Sequence["Pair"], clips: Sequence["Clip"]
) -> "VideoSetup":
    """How videos are predicted; refuses flags that say nothing about what there is."""
    from annotation.frame_options import FrameOptions
    from result_record import TABLE
    from video_prediction import check_flags
    from video_results import VideoSetup

    check_flags(args, images=bool(pairs), videos=bool(clips))
    results = replace(setup.results, form="png")
    frames = FrameOptions(args.step, args.fps, args.skip_similar)
    reduce = setup.read.reduce or setup.configs[0].geometry.reduction
    kinds, tiles = (*args.save, TABLE), replace(setup.tiles, tissue="")
    return VideoSetup(
        *(setup.configs, tiles, results, kinds, frames, args.max_frames, reduce, setup.full_size, setup.digest),
        thumbnails=args.thumbnails,
    )


def load_engine(
    setup: "Setup", args: argparse.Namespace, paths: Sequence[Path], megapixels: Callable[[], float], device: str
) -> "Engine":
    """Load the networks for so much work; says which checkpoint, backend and device work."""
    from backends import load_forward
    from picture_prediction import Engine
    from predictor import mean_of

    backend, work = args.backend, 0.0
    if backend != "torch" and args.dry_run:  # an export is a file: it is used when it exists, and not made
        backend = "auto"
    elif backend == "auto" and device == "cpu":
        work = megapixels()
    amp = "no" if device == "cpu" else args.amp
    forwards, names = [], [amp]
    for path in paths:
        config, forward, note = load_forward(path, device, backend=backend, megapixels=work or None, amp=amp)
        forwards.append(forward)
        names.append(note.split(",")[0])
        print(f"checkpoint {path}: {config.architecture} {config.encoder}, {config.geometry.kind}; {note}")
    return Engine(mean_of(forwards, len(setup.configs[0].channels)), " ".join(names))


def sum_megapixels(setup: "Setup", pairs: Sequence["Pair"], videos: "VideoSetup", clips: Sequence["Clip"]) -> float:
    """What a network will see, to tell whether preparing a faster one pays; no more of it than tells."""
    from picture_prediction import pixels_seen
    from video_prediction import sum_clips

    total = 0.0
    for pair in pairs:
        total += pixels_seen(setup, pair) / 1e6
        if total > ENOUGH_MEGAPIXELS:
            return total
    return total + sum_clips(videos, clips)


def default_output(path: Path, first: Path, threshold: float) -> Path:
    """<checkpoint's folder>/<parent>_<folder>_thres_<t> of the first input, from resolved paths."""
    folder = first.resolve().parent
    return path.resolve().parent / f"{folder.parent.name}_{folder.name}_thres_{threshold:g}"


# ----------------------------------------------------------------------------------------------------------------------
# What was done before


def finished_before(
    setup: "Setup", pairs: Sequence["Pair"], videos: "VideoSetup", clips: Sequence["Clip"], *, overwrite: bool
) -> tuple[set[str], dict[str, str]]:
    """Names of inputs whose results are there, made with the same flags from the same files; digests of the videos.

    Raises:
        FileExistsError: results of other flags, or of something else, are in the way.
    """
    from picture_prediction import picture_digest
    from result_record import find_done
    from results import working_folder
    from video_prediction import clip_digest

    folder = setup.results.folder
    digests = {pair.name: picture_digest(setup, pair) if pair.image.is_file() else None for pair in pairs}
    moving = {clip.name: clip_digest(videos, clip) for clip in clips}
    done = find_done(folder, digests, setup.results.kinds, overwrite=overwrite, report=print)
    done |= find_done(folder, moving, videos.kinds, overwrite=overwrite, report=print)
    for name in done:  # of a run that was killed between its last two steps
        shutil.rmtree(working_folder(folder, name), ignore_errors=True)
    return done, moving


# ----------------------------------------------------------------------------------------------------------------------
# Prediction


def predict_all(
    setup: "Setup", engine: "Engine", pairs: Sequence["Pair"], thumbnails: int, writer: Callable[[], Any]
) -> tuple[int, list[str]]:
    """Predict image after image; a full disk ends the run.

    Returns:
        Number of images that have results, and what went wrong with these and others.
    """
    from picture_prediction import predict_one
    from run_folder import shrink_panel

    made, failures = 0, list[str]()
    for number, pair in enumerate(pairs):
        try:
            panel, damage = predict_one(setup, engine, pair, with_picture=number < thumbnails)
            made += 1
            failures += damage
            if panel is not None:
                writer().add_image(f"predict/{pair.name}", shrink_panel(panel), dataformats="HWC")
        except (OSError, ValueError, RuntimeError) as error:
            failures.append(tell_failure(error, pair.name, pair.image))
    return made, failures


def predict_clips(videos: "VideoSetup", clips: Sequence["Clip"], digests: Mapping[str, str]) -> tuple[int, list[str]]:
    """Predict video after video; see predict_all."""
    from video_prediction import predict_video

    made, failures = 0, list[str]()
    for clip in clips:
        try:
            told, damage = predict_video(videos, clip, digests[clip.name])
            made, failures = made + 1, failures + damage
            print(f"{clip.name}: {told}")
        except (OSError, ValueError, RuntimeError) as error:
            failures.append(tell_failure(error, clip.name, clip.path))
    return made, failures


def tell_failure(error: Exception, name: str, path: Path) -> str:
    """What went wrong with an input, for the end of the run, which a full disk brings at once."""
    from spool import FULL

    if isinstance(error, OSError) and error.errno in FULL:
        raise disk_full(error) from error
    print(f"{name}: failed")
    text = cli.plain_message(error)
    return text if str(path) in text else f"{path}: {text}"


def disk_full(error: OSError) -> OSError:
    """The same error, and what to do about it."""
    text = str(error.strerror or error)
    if "make room" not in text:
        text += "; what was finished before is kept: make room, then run the same command again"
    return OSError(error.errno, text, error.filename)


@contextmanager
def open_writer(args: argparse.Namespace, folder: Path) -> Iterator[Callable[[], Any]]:
    """A function that gives TensorBoard's writer of the run, opened when first asked for: no empty run is left."""
    opened: list[Any] = []

    def writer() -> Any:
        if not opened:
            from torch.utils.tensorboard import SummaryWriter

            whole = folder.resolve()
            name = args.exp_name or f"predict_{whole.parent.name}_{whole.name}"
            opened.append(SummaryWriter(str(args.log_dir / name)))
        return opened[0]

    try:
        yield writer
    finally:
        for each in opened:
            each.close()
            print(f"tensorboard --logdir {shlex.quote(str(args.log_dir))}")


# ----------------------------------------------------------------------------------------------------------------------
# Before a long run


def estimate(
    setup: "Setup", engine: "Engine", pairs: Sequence["Pair"], videos: "VideoSetup", clips: Sequence["Clip"]
) -> list[str]:
    """Print windows, memory, disk and expected time of every input, and predict nothing."""
    from picture_prediction import frame_of, tiles_for
    from predictor import Picture, memory_needed, plan_picture, tile_seconds
    from results import disk_needed, existing_parent
    from video_prediction import clip_disk, measure_clip

    failures, seconds, total = [], tile_seconds(setup.configs, setup.tiles, engine.forward), 0.0
    print(f"{'image':30} {'pixels':>15} {'windows':>9} {'memory':>11} {'disk':>9} {'at most':>9} {'time':>9}")
    for pair in pairs:
        try:
            with Picture(pair, setup.configs, setup.read) as picture:
                plan = plan_picture(picture, tiles_for(setup, pair), full_size=setup.full_size)
                frame = frame_of(pair.name, picture, plan)
                memory = memory_needed(picture, plan, setup.tiles)
                likely, most = disk_needed(frame, setup.configs[0], setup.results)
        except (OSError, ValueError, RuntimeError) as error:
            failures.append(str(error))
            continue
        windows = 1 if setup.configs[0].geometry.kind == "resize" else plan.tiles
        total += windows * seconds
        print(
            f"{pair.name[:30]:30} {frame.height:>7}x{frame.width:<7} {windows:>9} {memory / 1e9:>8.2f} GB "
            f"{likely / 1e9:>6.2f} GB {most / 1e9:>6.2f} GB {spell_time(windows * seconds):>9}"
        )
    for clip in clips:
        try:
            frames, (height, width), tiles = measure_clip(videos, clip)
            likely, most = clip_disk(videos, clip.name, frames, (height, width))
        except (OSError, ValueError) as error:
            failures.append(str(error))
            continue
        total += frames * tiles * seconds
        print(
            f"{clip.name[:30]:30} {height:>7}x{width:<7} {frames * tiles:>9} {f'{frames} frames':>11} "
            f"{likely / 1e9:>6.2f} GB {most / 1e9:>6.2f} GB {spell_time(frames * tiles * seconds):>9}"
        )
    if "PyTorch on cpu" in engine.name:
        print("timed with PyTorch; unless --backend torch, the run may prepare ONNX Runtime, 3 to 4 times faster")
    free = shutil.disk_usage(existing_parent(setup.results.folder)).free
    counts = ((len(pairs), "image"), (len(clips), "video"))
    count = ", ".join(f"{number} {word}{'s' if number > 1 else ''}" for number, word in counts if number)
    print(f"{count}, {spell_time(total)} at {seconds:.3f} s a window; {free / 1e9:.1f} GB free")
    return failures


def spell_time(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


if __name__ == "__main__":
    main()
