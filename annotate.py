"""Draft labels for unlabelled pictures: masks and label maps to train on, tables of objects, a list of what to review.

Examples:
    python annotate.py --images pictures
    python annotate.py --images pictures --detector bubbles.onnx --sam sam_vit_b_01ec64.pth --panels
    python annotate.py --images froth.mp4 --fps 1 --mm-per-pixel 0.05
    python annotate.py --images pictures --against masks --tune 4

The output folder is a data set for train.py. What is done is not done again, and labels that a person edited are never
overwritten. Files that cannot be read are named, the rest is done, and the exit status is 1.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import shlex
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cli

if TYPE_CHECKING:
    import numpy as np

    from annotation.engine_options import EngineOptions
    from annotation.engines import Engines
    from annotation.records import FileOptions

INTERRUPTED = "the same command goes on where it stopped"
DAMAGES = 3  # messages about the damage of one picture


def build_parser() -> argparse.ArgumentParser:
    """Flags of annotate.py."""
    from annotation.engine_options import add_engine_args
    from annotation.frame_options import add_frame_args
    from annotation.score_options import add_score_args
    from annotation.tune_options import add_tune_args

    parser = cli.make_parser("Draft labels for unlabelled pictures: watershed, detectors, SAM, or a trained network.")
    add_image_args(parser)
    add_output_args(parser)
    add_run_args(parser)
    cli.add_log_args(parser)
    add_engine_args(parser)
    add_frame_args(parser)
    add_score_args(parser)
    add_tune_args(parser)
    return parser


def add_image_args(parser: argparse.ArgumentParser) -> None:
    """Add where the pictures are, and where the labels go."""
    group = parser.add_argument_group("pictures")
    group.add_argument(
        "--images",
        nargs="+",
        required=True,
        metavar="PATH",
        help="picture or video files, folders of them, or globs",
    )
    group.add_argument(
        "-o", "--output-dir", type=Path, metavar="DIR", help="output; default: <folder of the pictures>_labels"
    )
    group.add_argument(
        "--max-megapixels",
        type=cli.positive_float,
        default=50.0,
        metavar="N",
        help="larger pictures are looked at window by window, in bounded memory",
    )
    cli.add_decoded_arg(group)


def add_output_args(parser: argparse.ArgumentParser) -> None:
    """Add what is written about each picture."""
    group = parser.add_argument_group("output")
    cli.add_switch(group, "--copy", help="copy the pictures into images/ instead of linking them")
    group.add_argument(
        "--gap",
        type=cli.natural,
        default=1,
        metavar="N",
        help="pixels of background between touching objects in gt/; label maps have none",
    )
    group.add_argument("--mm-per-pixel", type=cli.positive_float, metavar="X", help="adds millimetres to objects.csv")
    group.add_argument(
        "--coco", choices=("rle", "polygons"), default="rle", help="how annotations.json describes objects"
    )
    group.add_argument("--yolo", choices=("detect", "segment"), default="detect", help="boxes or outlines in yolo/")
    cli.add_switch(group, "--overlays", default=True, help="draw the objects over each picture")
    cli.add_switch(group, "--panels", help="draw a page for each picture: itself, each engine's objects, all together")
    cli.add_switch(group, "--geojson", help="write outlines for QuPath too")


def add_run_args(parser: argparse.ArgumentParser) -> None:
    """Add how many pictures are in work at a time, and where networks run."""
    group = parser.add_argument_group("run")
    group.add_argument(
        "-w",
        "--workers",
        type=cli.natural,
        default=2,
        metavar="N",
        help="pictures at a time, a process for each; 0: in this one",
    )
    cli.add_device_args(group)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, find the pictures, annotate each, write the tables."""
    parser = build_parser()
    args = cli.parse(parser, argv)
    with cli.plain_errors(parser, interrupted=INTERRUPTED):
        failures = run(args, argv)
    cli.exit_with_findings(parser, failures)


@dataclass(frozen=True)
class Task:
    """What each process needs to know.

    settings: digest of everything that changes the objects of a picture.
    own: engines with settings of their own, by stem: those of a video's frames are chosen once.
    """

    engines: "EngineOptions"
    files: "FileOptions"
    settings: str
    max_pixels: float
    megapixels: float
    max_decoded_gb: float
    own: Mapping[str, "EngineOptions"]

    def digest(self, stem: str) -> str:
        """Of everything that changes the objects of one picture."""
        own = self.own.get(stem)
        return self.settings if own is None else hashlib.sha256(f"{self.settings} {own.watershed}".encode()).hexdigest()


def run(args: argparse.Namespace, argv: Sequence[str] | None) -> list[str]:
    """Annotate all pictures; return what went wrong."""
    cli.share_cores()

    from annotation import score_options, scoring, tune_options
    from annotation.engine_options import options_from, pick_device
    from annotation.records import hold_folder

    against = score_options.options_from(args)
    tune_options.options_from(args)
    if against.folder:
        scoring.References(against)  # says now, and not in the end, that there are none
    device = pick_device(args)
    engines = options_from(args, device)
    pictures, videos = find_pictures(args.images)
    files = file_options(args, pictures, videos)
    check_folder(files.folder, pictures)
    with hold_folder(files.folder):
        return annotate_found(args, argv, engines, files, pictures, videos)


def annotate_found(
    args: argparse.Namespace,
    argv: Sequence[str] | None,
    engines: "EngineOptions",
    files: "FileOptions",
    pictures: Sequence[Path],
    videos: Sequence[Path],
) -> list[str]:
    """Annotate pictures and the frames of videos; return what went wrong."""
    from annotation import score_options, scoring
    from annotation.files import remove_leftovers

    against = score_options.options_from(args)
    remove_leftovers(files)
    frames, failures = take_frames(videos, files.folder, args)
    stems, doubled = name_pictures([*pictures, *(path for each in frames.values() for path in each)])
    failures += doubled
    if not stems:
        return failures
    if against.folder:
        scoring.References(against).common(stems)  # says now, and not in the end, that none fits
    if args.tune:
        engines = tune_engines(args, engines, stems, files.folder, failures)
    task = make_task(args, engines, files, stems, list(frames.values()))
    print(f"engines: {', '.join(engines.names)}; {len(stems)} picture{'s' * (len(stems) > 1)} -> {files.folder}")
    records, failed = annotate_all(task, stems, args.workers)
    failures += failed
    if not records:
        return failures
    write_results(args, argv, files, records, stems)
    print(summary_of(records))
    failures += finish_videos(videos, files, records, args)
    if against.folder:
        failures += print_scores(files, against, [record["stem"] for record in records])
    try:
        log_run(args, files, records)
    except OSError as error:
        failures.append(
            f"{args.log_dir}: TensorBoard's files cannot be written there ({error}); give another --log-dir"
        )
    return list(dict.fromkeys(failures))


# ----------------------------------------------------------------------------------------------------------------------
# Pictures


def find_pictures(words: Sequence[str]) -> tuple[list[Path], list[Path]]:
    """Pictures and videos behind file names, folders and globs.

    Raises:
        FileNotFoundError: a word stands for nothing.
    """
    from annotation.video import VIDEO_SUFFIXES
    from pictures import list_pictures

    found = list_pictures(words, more=VIDEO_SUFFIXES)
    videos = [path for path in found if path.suffix.lower() in VIDEO_SUFFIXES]
    return [path for path in found if path not in videos], videos


def file_options(args: argparse.Namespace, pictures: Sequence[Path], videos: Sequence[Path]) -> "FileOptions":
    """What is written where."""
    from annotation.records import FileOptions
    from image_io import file_stem

    folder = args.output_dir
    if folder is None:
        first = Path(args.images[0])
        base = first if first.is_dir() else (pictures or videos)[0].parent
        if not first.is_dir() and not pictures:
            base = base / file_stem(videos[0])
        base = base.resolve()
        folder = base.with_name(f"{base.name}_labels")
    return FileOptions(
        folder,
        copy=args.copy,
        mm_per_pixel=args.mm_per_pixel,
        overlays=args.overlays,
        panels=args.panels,
        geojson=args.geojson,
        gap=args.gap,
        coco=args.coco,
        yolo=args.yolo,
        decimal=args.decimal,
    )


def check_folder(folder: Path, pictures: Sequence[Path]) -> None:
    """Refuse to write among the pictures, and where nothing can be written.

    Raises:
        UsageError: the output is a folder that pictures are read from.
        OSError: it cannot be written to.
    """
    whole = folder.resolve()
    for place in {path.parent.resolve() for path in pictures}:
        if place in (whole, *(whole / name for name in ("gt", "labels", "overlays", "panels"))):
            raise cli.UsageError(f"-o {folder}: pictures are read from {place}; expected another folder for the labels")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(
            error.errno, f"{error.strerror}; expected a folder that can be written to: name one with -o", str(folder)
        ) from error


def take_frames(
    videos: Sequence[Path], folder: Path, args: argparse.Namespace
) -> tuple[dict[Path, list[Path]], list[str]]:
    """Write the chosen frames of videos into frames/; return the files of each and what went wrong."""
    from annotation.frame_options import FrameOptions
    from annotation.video import VideoError, extract_frames

    frames, failures = dict[Path, list[Path]](), list[str]()
    options = FrameOptions(args.step, args.fps, args.skip_similar)
    for video in videos:
        try:
            extracted = extract_frames(video, folder / "frames", options)
        except VideoError as error:
            failures.append(str(error))
            continue
        failures += extracted.findings
        frames[video] = [folder / "frames" / row["file"] for row in extracted.rows]
        print(f"{video.name}: {len(extracted.rows)} frames")
    return frames, failures


def name_pictures(paths: Sequence[Path]) -> tuple[dict[str, Path], list[str]]:
    """Stem to picture, and what shares the stem of another: their labels would have one name."""
    from image_io import file_stem

    stems: dict[str, Path] = {}
    doubled = []
    for path in paths:
        stem = file_stem(path)
        if stem in stems:
            doubled.append(f"{path}: {stems[stem]} has the same stem, and labels are named by it; rename one of them")
        else:
            stems[stem] = path
    return stems, doubled


# ----------------------------------------------------------------------------------------------------------------------
# Engines


def make_task(
    args: argparse.Namespace,
    engines: "EngineOptions",
    files: "FileOptions",
    stems: Mapping[str, Path],
    films: Sequence[Sequence[Path]],
) -> Task:
    """What the processes share; films are the frames of each video."""
    from annotation.engines import choose_for_video
    from image_io import file_stem
    from pictures import count_pixels

    own = {file_stem(path): chosen for film in films for chosen in [choose_for_video(engines, film)] for path in film}

    counted = sum(map(count_pixels, stems.values())) / 1e6 if "model" in engines.parts else 0.0
    settings = hashlib.sha256(repr((engines.digest(), args.max_megapixels)).encode()).hexdigest()
    return Task(engines, files, settings, args.max_megapixels * 1e6, counted, args.max_decoded_gb, own)


def tune_engines(
    args: argparse.Namespace,
    engines: "EngineOptions",
    stems: Mapping[str, Path],
    folder: Path,
    failures: list[str],
) -> "EngineOptions":
    """Search the engines' settings on a few pictures with references; write them down and return the best."""
    from annotation import score_options, scoring, tune_options, tuning
    from annotation.engine_options import space_of, with_settings
    from annotation.engines import Cache, Engines

    references = scoring.References(score_options.options_from(args))
    samples, unread = tuning.read_samples(stems, references, args.tune)
    failures += unread
    print(f"tuning on {', '.join(sample.name for sample in samples)}")
    loaded = Engines(engines)

    def segment(image: "np.ndarray", settings: Mapping[str, Any], cache: Cache) -> Any:
        changed = with_settings(args, settings, engines.device) if settings else engines
        return loaded.changed(changed).find(image, cache)[0]

    tuning_options = tune_options.options_from(args)
    found = tuning.tune(segment, space_of(engines), samples, tuning_options, tell=print)
    path = tuning.write_tuning(folder, found, changed_flags(args), args.decimal)
    print(f"chosen: {found.best.settings or 'the default'}; --settings {shlex.quote(str(path))} uses it again")
    return with_settings(args, found.best.settings, engines.device)


def changed_flags(args: argparse.Namespace) -> dict[str, Any]:
    """The flags of the engines that are not as by default."""
    from annotation.engine_options import add_engine_args

    parser = argparse.ArgumentParser(add_help=False)
    add_engine_args(parser)
    defaults = {action.dest: action.default for action in parser._actions}
    return {name: getattr(args, name) for name, default in defaults.items() if getattr(args, name) != default}


# ----------------------------------------------------------------------------------------------------------------------
# Each picture


_LOADED: tuple[Task, "Engines"] | None = None  # of a process


def load_engines(task: Task) -> None:
    """Load the engines once in each process."""
    global _LOADED
    cli.share_cores()
    from annotation.engines import Engines
    from annotation.processes import keep_memory

    keep_memory()
    _LOADED = task, Engines(task.engines, megapixels=task.megapixels or None)


def annotate_one(path: Path) -> dict[str, Any] | str:
    """Annotate one picture; return its record, or what went wrong."""
    from image_io import file_stem

    assert _LOADED is not None
    task, engines = _LOADED
    try:
        return {**annotate_picture(task, engines, path, file_stem(path)), "notes": engines.all_notes()}
    except Exception as error:  # one bad file stops nothing, whatever is wrong with it
        if os.environ.get("TESSERA_TRACEBACK") == "1":
            raise
        text = cli.plain_message(error) or type(error).__name__
        if not isinstance(error, (OSError, ValueError, RuntimeError)):  # not foreseen: a defect of ours
            text = f"{type(error).__name__}: {text}; TESSERA_TRACEBACK=1 shows where"
        return text if str(path) in text else f"{path}: {text}"


def find_done(task: Task, path: Path) -> dict[str, Any] | None:
    """The record of a picture whose files are all there and up to date."""
    from annotation.records import brief, digest_file, is_done, read_record
    from image_io import ImageError, file_stem

    stem = file_stem(path)
    try:
        if not task.files.record(stem).is_file() or not is_done(task.files, stem, digest_file(path), task.digest(stem)):
            return None
    except (OSError, ImageError):  # said when its turn comes
        return None
    record = read_record(task.files, stem)
    return None if record is None else brief(record)


def annotate_picture(task: Task, engines: "Engines", path: Path, stem: str) -> dict[str, Any]:
    """Annotate one picture and write its files, but none that somebody edited."""
    from annotation.files import write_edited, write_image_files
    from annotation.records import digest_file, is_edited
    from image_io import read_image
    from pictures import count_pixels

    digest, settings = digest_file(path), task.digest(stem)
    if stem in task.own:
        engines = engines.changed(task.own[stem])
    if count_pixels(path) > task.max_pixels:
        return annotate_large(task, engines, path, stem, digest)
    image = read_image(path)
    if is_edited(task.files, stem):
        return write_edited(task.files, path, image, settings, image_digest=digest)
    begin = time.perf_counter()
    found, parts = engines.find(image)
    seconds = time.perf_counter() - begin
    return write_image_files(
        task.files, path, image, found, parts, settings, seconds, image_digest=digest, chosen=engines.chosen
    )


def annotate_large(task: Task, engines: "Engines", path: Path, stem: str, digest: str) -> dict[str, Any]:
    """Annotate a picture window by window; what could not be decoded is said in the record, and has no objects."""
    from tqdm import tqdm

    from annotation import large

    hidden = True if multiprocessing.parent_process() else None  # bars of several processes would run into each other
    with tqdm(desc=path.name, unit="window", leave=False, disable=hidden, position=1) as bar:

        def show(windows: int, total: int) -> None:
            bar.total = total
            bar.update(windows - bar.n)

        return large.annotate_large(
            task.files, path, engines, task.digest(stem), digest, max_decoded_gb=task.max_decoded_gb, progress=show
        )


def annotate_all(task: Task, stems: Mapping[str, Path], workers: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Annotate all pictures; return the records of those that have labels, and what went wrong with the others."""
    from tqdm import tqdm

    from annotation.processes import run_processes

    done = {path: found for path in stems.values() if (found := find_done(task, path))}
    if done:
        print(f"{len(done)} already done")
    rest = [path for path in stems.values() if path not in done]
    failures, notes, begin, pixels = list[str](), set[str](), time.perf_counter(), 0
    with (
        closing(run_processes(partial(load_engines, task), annotate_one, rest, workers)) as results,
        tqdm(total=len(stems), initial=len(done), desc="annotate", unit="picture", leave=False, disable=None) as bar,
    ):
        for path, record in results:
            bar.update()
            if isinstance(record, str):
                failures.append(record)
                tqdm.write(f"{path.name}: failed")
                continue
            for note in record.pop("notes"):
                if note not in notes:
                    tqdm.write(note)
                    notes.add(note)
            done[path] = record
            pixels += record["size"][0] * record["size"][1]
            bar.set_postfix_str(f"{pixels / 1e6 / (time.perf_counter() - begin):.2f} MP/s")
    seconds, made = time.perf_counter() - begin, len(rest) - len(failures)
    failures += [message for path, record in done.items() for message in few_of(record.get("damage", ()), path)]
    if made:
        print(f"{made} annotated: {pixels / 1e6:.1f} MP in {seconds:.1f} s, {pixels / 1e6 / seconds:.2f} MP/s")
    return [done[path] for path in stems.values() if path in done], failures


def few_of(messages: Sequence[str], path: Path) -> list[str]:
    """The first messages about a picture, and how many more there are: a file cut short can lack a thousand pieces."""
    more = len(messages) - DAMAGES
    return [*messages[:DAMAGES], *([f"{path}: {more} more pieces are damaged"] if more > 0 else [])]


# ----------------------------------------------------------------------------------------------------------------------
# After all pictures


def write_results(
    args: argparse.Namespace,
    argv: Sequence[str] | None,
    files: "FileOptions",
    records: Sequence[Mapping[str, Any]],
    stems: Collection[str],
) -> None:
    """Write the tables, also about pictures of the folder that were not asked for, and args.json for --settings."""
    from annotation.records import list_records
    from annotation.report import write_tables
    from image_io import write_text

    images, labels = files.folder / "images", files.folder / "labels"
    others = (each for each in list_records(files) if each["stem"] not in stems)
    earlier = [each for each in others if (images / each["image"]).exists() and (labels / each["label_file"]).exists()]
    if earlier:
        print(f"the tables also hold {len(earlier)} picture{'s' * (len(earlier) > 1)} annotated earlier")
    record = cli.run_record(args, argv)
    write_tables(files, [*records, *earlier], {"settings": record})
    write_text(files.folder / "args.json", json.dumps(record, indent=2) + "\n")


def summary_of(records: Sequence[Mapping[str, Any]]) -> str:
    """Lines for the terminal: objects, and what to look at."""
    objects = sum(record["objects"] for record in records)
    edited = sum(any(record["edited"].values()) for record in records)
    flagged = sum(bool(record["flags"]) and not any(record["edited"].values()) for record in records)
    lines = [f"{objects} objects in {len(records)} picture{'s' * (len(records) > 1)}"]
    presets = Counter(record["preset"] for record in records if record.get("preset"))
    if presets:
        lines.append("watershed presets: " + ", ".join(f"{name} {count}" for name, count in presets.most_common()))
    if edited:
        lines.append(f"{edited} edited by hand: kept")
    if flagged:
        lines.append(f"{flagged} worth a look: review.csv lists them, the most doubtful first")
    return "\n".join(lines)


def print_scores(files: "FileOptions", options: Any, stems: Sequence[str]) -> list[str]:
    """Compare the label maps with references; return what could not be compared."""
    from annotation.records import list_label_files
    from annotation.scoring import score_files, write_scores

    found = {stem: paths[0] for stem in stems if (paths := list_label_files(files.folder, "labels", stem))}
    try:
        board, failures = score_files(found, options)
    except ValueError as error:
        return [str(error)]
    for line in (*board.lines(), *board.notes):
        print(line)
    print(f"scores in {write_scores(files.folder, board, files.decimal)}")
    return failures


def finish_videos(
    videos: Sequence[Path], files: "FileOptions", records: Sequence[Mapping[str, Any]], args: argparse.Namespace
) -> list[str]:
    """Counts and sizes over time, and a video of the overlays, for each video; return what could not be written."""
    if not videos:
        return []
    from annotation.records import read_record
    from annotation.video import VideoError, frame_rows, list_frames, play_rate, write_time_tables, write_video
    from image_io import file_stem, read_image

    stems = {record["stem"] for record in records}
    frames = [row for row in list_frames(files.folder / "frames") if file_stem(Path(row["file"])) in stems]

    def objects() -> Iterator[dict[str, Any]]:
        for row in frames:
            stem = file_stem(Path(row["file"]))
            table = (read_record(files, stem) or {}).get("table", {})
            for area, diameter in zip(table.get("area", ()), table.get("equivalent_diameter", ()), strict=True):
                yield {"image": stem, "area": area, "equivalent_diameter": diameter}

    unit = "pixels" if args.mm_per_pixel is None else "mm"
    rows = frame_rows(frames, objects(), mm_per_pixel=args.mm_per_pixel)
    write_time_tables(files.folder, rows, decimal=args.decimal, unit=unit)
    failures = []
    for video in videos if files.overlays else ():
        own = [row for row in rows if row["video"] == video.name]
        overlays = (files.place("overlays", file_stem(Path(row["file"]))) for row in own)
        path = files.folder / f"{file_stem(video)}_overlay.mp4"
        try:
            if write_video(path, (read_image(each) for each in overlays if each.is_file()), play_rate(own)):
                print(f"overlay video: {path}")
        except VideoError as error:
            failures.append(str(error))
    return failures


def log_run(args: argparse.Namespace, files: "FileOptions", records: Sequence[Mapping[str, Any]]) -> None:
    """Show the run in TensorBoard."""
    from annotation.previews import log_previews

    whole = files.folder.resolve()
    log_previews(args.log_dir / (args.exp_name or f"annotate_{whole.parent.name}_{whole.name}"), files, records)
    print(f"tensorboard --logdir {shlex.quote(str(args.log_dir))}")


if __name__ == "__main__":
    main(sys.argv[1:])
