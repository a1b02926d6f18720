"""Turn masks or label maps into a training set for YOLO: boxes, or outlines for its segment models.

Examples:
    python -m dataset_utils.make_yolo -d pictures_labels -o bubbles_yolo
    python -m dataset_utils.make_yolo -d data/nuclei -o nuclei_yolo --task segment
    python -m dataset_utils.make_yolo -d data/streets -o cars_yolo --class-list 8 --class-names car

Reads a data set as train.py does (train/ and val/, or images/ and gt/ of which a part is kept for validation, chosen
by name). Instance maps in labels/, as annotate.py writes them, go before gt/. Writes images/{train,val},
labels/{train,val} and data.yaml. Pictures that YOLO's own reader would show otherwise (16 bit, float, TIFF, GIF,
several bands, turned by EXIF) are written as 8-bit PNG, stretched as annotate.py shows them to a detector; the rest
is linked. The same command again goes on with what is missing or older than its mask.
"""

import argparse
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import cli

if TYPE_CHECKING:
    import numpy as np

    from pairing import Pair

LINKED = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
LABEL_DIR = "labels"
RECORD = ".make_yolo.json"
FEW_VALUES = 2  # of a mask that needs no list of classes: background and the object


@dataclass(frozen=True)
class Rules:
    """What an object of a mask is.

    instances: every value is one object; else an object is a 4-connected piece of a class. classes: mask label of each
    class, or none: every value but 0 is the one class. min_area: smaller objects are left out, in pixels.
    """

    task: str
    instances: bool
    classes: tuple[int, ...]
    names: tuple[str, ...]
    min_area: int


def build_parser() -> argparse.ArgumentParser:
    """Flags of dataset_utils.make_yolo."""
    parser = cli.make_parser("Turn masks or label maps into a training set for YOLO.")
    group = parser.add_argument_group("objects")
    group.add_argument("-d", "--dataset", type=Path, required=True, metavar="DIR", help="data set root")
    group.add_argument("--task", choices=("detect", "segment"), default="detect", help="boxes, or outlines")
    group.add_argument(
        "--objects",
        choices=("auto", "components", "labels"),
        default="auto",
        help="components: connected pieces of a class; labels: every value is one object; auto: labels in labels/ and "
        "in 16-bit masks",
    )
    group.add_argument(
        "--class-list", nargs="+", default=[], metavar="LABEL", help="mask labels that are classes, such as 64 128"
    )
    group.add_argument("--class-names", nargs="+", metavar="NAME", help="names of the classes, in their order")
    group.add_argument("--min-area", type=cli.natural, default=0, metavar="N", help="drop objects of fewer pixels")
    cli.add_split_args(parser, val_share=0.2)
    group = parser.add_argument_group("output")
    group.add_argument("-o", "--output-dir", type=Path, required=True, metavar="DIR", help="where the set goes")
    cli.add_switch(group, "--copy", help="copy pictures instead of linking them")
    cli.add_switch(group, "--overwrite", help="make all labels anew, such as after a run with other flags")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Make the training set that the flags describe."""
    parser = build_parser()
    args = cli.parse(parser, argv)
    with cli.plain_errors(parser, interrupted="the same command goes on with the first picture that is not done"):
        failures = run(args)
    cli.exit_with_findings(parser, failures)


def run(args: argparse.Namespace) -> list[str]:
    """Write both splits; return what went wrong."""
    from tqdm import tqdm

    from pairing import DatasetError, FileOptions, find_splits

    options = FileOptions((), args.roi_dir, args.ids, args.val_share, args.group_pattern)
    train, val, note = find_splits(args.dataset, options)
    sides = {"train": use_labels(train.pairs), "val": use_labels(val.pairs)}
    failures = list(dict.fromkeys([*train.errors, *val.errors]))
    bare = [pair for pairs in sides.values() for pair in pairs if pair.mask is None]
    if bare:
        raise DatasetError(
            f"{len(bare)} pictures have no mask, first: {bare[0].image}; expected {LABEL_DIR}/, gt/ or masks/ with one "
            "for each: python annotate.py draws them"
        )
    rules, said = choose_rules(args, [pair for pairs in sides.values() for pair in pairs])
    print(f"{note}\n{said}")
    begin(args, rules, sides)
    counts: Counter[str] = Counter()
    for split, pairs in sides.items():
        for pair in tqdm(pairs, split, leave=False, disable=None, unit="picture"):
            try:
                objects = write_pair(args, rules, split, pair)
            except (OSError, ValueError) as error:
                failures.append(str(error))
                continue
            counts[f"{split} pictures"] += 1
            counts[f"{split} objects"] += objects
            counts[f"{split} empty"] += objects == 0
    write_description(args.output_dir, rules)
    for split in sides:
        empty = counts[f"{split} empty"]
        print(f"{split}: {counts[f'{split} pictures']} pictures, {counts[f'{split} objects']} objects, {empty} without")
    print(f"{args.output_dir / 'data.yaml'} is what the training takes")
    return failures


def use_labels(pairs: Sequence["Pair"]) -> list["Pair"]:
    """The pairs with the instance maps of labels/ beside images/ in place of masks, where every picture has one."""
    from dataclasses import replace

    from image_io import list_images

    folders = {pair.image.parent.parent / LABEL_DIR for pair in pairs}
    found = {folder: list_images(folder) for folder in folders if folder.is_dir()}
    maps = [found.get(pair.image.parent.parent / LABEL_DIR, {}).get(pair.name) for pair in pairs]
    if any(path is None for path in maps):
        return list(pairs)
    return [replace(pair, mask=path) for pair, path in zip(pairs, maps, strict=True)]


def choose_rules(args: argparse.Namespace, pairs: Sequence["Pair"]) -> tuple[Rules, str]:
    """What the objects of these masks are, and a sentence that says so.

    Raises:
        cli.UsageError: flags that do not fit together; DatasetError: 8-bit masks of several values and no list.
    """
    if args.objects == "labels" and args.class_list:
        raise cli.UsageError("--objects labels makes every value an object, --class-list makes values classes: one")
    words = " ".join(args.class_list).split()
    if not all(word.isdecimal() and int(word) for word in words) or len(set(words)) < len(words):
        raise cli.UsageError(f"--class-list {' '.join(words)}: expected different labels above 0, such as 64 128")
    classes = tuple(map(int, words))
    names = tuple(args.class_names or ([f"class_{label}" for label in classes] if len(classes) > 1 else ["object"]))
    if len(names) != max(1, len(classes)) or len(set(names)) < len(names):
        raise cli.UsageError(
            f"--class-names has {len(set(names))} names for {max(1, len(classes))} classes; expected a name for each"
        )
    instances = args.objects == "labels" or (args.objects == "auto" and not classes and hold_labels(pairs))
    what = "every value of a mask is one object" if instances else "every connected piece of a class is one object"
    return Rules(args.task, instances, classes, names, args.min_area), f"{what}; classes: {' '.join(names)}"


def hold_labels(pairs: Sequence["Pair"]) -> bool:
    """Whether these files are label maps, one value for each object: labels/, and masks of 16 or 32 bit.

    Raises:
        DatasetError: 8-bit masks of several values, which may be objects or classes.
    """
    import numpy as np

    from image_io import ImageError, read_mask
    from pairing import DatasetError

    values: set[int] = {0}
    for pair in pairs:
        assert pair.mask is not None, "checked before"
        if pair.mask.parent.name == LABEL_DIR:
            return True
        try:
            mask = read_mask(pair.mask)
        except (ImageError, OSError):
            continue  # named when its turn comes
        if mask.dtype != np.uint8:
            return True
        values |= set(np.flatnonzero(np.bincount(mask.ravel())).tolist())
        if len(values) > FEW_VALUES:
            shown = " ".join(map(str, sorted(values - {0})[:10]))
            raise DatasetError(
                f"{pair.mask} and those before it hold the labels {shown}: objects or classes? Give --objects labels "
                f'when every value is one object, or the classes to learn, such as --class-list "{max(values)}"'
            )
    return False


def begin(args: argparse.Namespace, rules: Rules, sides: dict[str, list["Pair"]]) -> None:
    """Note with which flags the set is made.

    Raises:
        FileExistsError: the folder holds a set of other flags or other pictures.
    """
    import image_io

    entry = {"rules": hashlib.sha256(repr(rules).encode()).hexdigest()}
    record = args.output_dir / RECORD
    folders = [args.output_dir / kind / split for kind in ("images", LABEL_DIR) for split in sides]
    if not record.is_file() and any(_visible(folder) for folder in folders):
        raise FileExistsError(
            f"{args.output_dir} holds a training set that this command did not make; expected an empty folder or none: "
            "give another one with -o"
        )
    if record.is_file() and not args.overwrite and json.loads(record.read_text(encoding="utf-8")) != entry:
        raise FileExistsError(
            f"{args.output_dir} was made with other flags; expected the same, another folder, or --overwrite"
        )
    for split, pairs in sides.items():
        wanted = {pair.name for pair in pairs}
        for folder in (args.output_dir / "images" / split, args.output_dir / LABEL_DIR / split):
            others = [path for path in _visible(folder) if image_io.file_stem(path) not in wanted]
            if others:
                raise FileExistsError(
                    f"{folder} holds {len(others)} files of another set, first: {others[0].name}; expected those of "
                    f"{args.dataset} alone: give another folder, or move them away"
                )
    image_io.write_text(record, json.dumps(entry))


def _visible(folder: Path) -> list[Path]:
    """The files of a folder, in order; none where there is no folder."""
    return sorted(path for path in folder.iterdir() if path.name[0] != ".") if folder.is_dir() else []


def write_pair(args: argparse.Namespace, rules: Rules, split: str, pair: "Pair") -> int:
    """Write the labels of one picture, then the picture; return how many objects it has."""
    from image_io import ImageError, read_image, read_mask, write_text
    from pairing import DatasetError

    assert pair.mask is not None, "checked before"
    target = args.output_dir / LABEL_DIR / split / f"{pair.name}.txt"
    pictures = args.output_dir / "images" / split
    if not args.overwrite and is_done(target, pictures, pair):
        return len(target.read_text(encoding="utf-8").splitlines())
    image, mask = read_image(pair.image), read_mask(pair.mask)
    if image.shape[:2] != mask.shape:
        raise DatasetError(
            f"{pair.mask} is {mask.shape[0]}x{mask.shape[1]}, its image {pair.image} is "
            f"{image.shape[0]}x{image.shape[1]}; sizes must agree"
        )
    if pair.roi:
        region = read_mask(pair.roi)
        if region.shape != mask.shape:
            raise ImageError(f"{pair.roi} is {region.shape}, expected {mask.shape} as {pair.image}")
        mask[region == 0] = 0
    lines = object_lines(mask, rules)
    place_picture(pair.image, image, pictures, pair.name, copy=args.copy)
    write_text(target, "".join(f"{line}\n" for line in lines))
    return len(lines)


def is_done(target: Path, pictures: Path, pair: "Pair") -> bool:
    """Whether the labels are there and no older than what they were made from, and the picture too."""
    if not target.is_file() or not any((pictures / f"{pair.name}{suffix}").is_file() for suffix in LINKED):
        return False
    sources = [path for path in (pair.image, pair.mask, pair.roi) if path]
    return target.stat().st_mtime >= max(path.stat().st_mtime for path in sources)


def object_lines(mask: "np.ndarray", rules: Rules) -> list[str]:
    """The rows of a YOLO label file: class and box, or class and outline, as shares of width and height.

    Args:
        mask: (H, W) classes or a label map. Of an object in several pieces the box holds all, the outline shows the
            largest; holes are not told.
    """
    import numpy as np

    from annotation.instances import find_runs, number_instances

    labels, kinds = number_objects(mask, rules)
    if rules.task == "segment":
        found = number_instances(labels, 0.0, "")  # the largest piece of each
        runs = find_runs(found.labels)
        kinds = kinds[labels.reshape(-1)[runs.places[np.unique(runs.values, return_index=True)[1]]]]
        kinds = kinds if runs.values.min() == 0 else np.concatenate([[0], kinds])
        return outline_lines(found.labels, kinds, rules.min_area)
    return box_lines(labels, kinds, rules.min_area)


def number_objects(mask: "np.ndarray", rules: Rules) -> tuple["np.ndarray", "np.ndarray"]:
    """Objects of a mask as (H, W) int32 labels 1..n, and the class of each, (n + 1,); entry 0 is background."""
    import numpy as np

    from annotation.instances import find_runs, number_instances, number_values

    if rules.classes:
        table = np.zeros(max(rules.classes) + 1, np.uint8)
        table[list(rules.classes)] = np.arange(1, len(rules.classes) + 1)
        mask = table[np.where(mask < len(table), mask, 0)]
    elif not rules.instances:
        mask = (mask > 0).view(np.uint8)
    if not rules.instances:
        labels = number_instances(mask, 0.0, "", pieces="all").labels  # the pieces of each value
        runs = find_runs(labels)
        kinds = np.zeros(int(labels.max()) + 1, np.int64)
        kinds[runs.values] = mask.reshape(-1)[runs.places].astype(np.int64) - 1
        return labels, kinds
    labels = number_values(mask)
    return labels, np.zeros(int(labels.max(initial=0)) + 1, np.int64)


def box_lines(labels: "np.ndarray", kinds: "np.ndarray", min_area: int) -> list[str]:
    """`class x y width height` of each object, centres and sides as shares of the picture."""
    import numpy as np

    from annotation.instances import find_runs

    runs, count = find_runs(labels), len(kinds)
    height, width = labels.shape
    ids, rows, columns = runs.values, runs.rows, runs.columns
    areas = np.bincount(ids, runs.lengths, count)
    left, top = np.full(count, width), np.full(count, height)
    right, bottom = np.zeros(count, np.int64), np.zeros(count, np.int64)
    np.minimum.at(left, ids, columns)
    np.minimum.at(top, ids, rows)
    np.maximum.at(right, ids, columns + runs.lengths)
    np.maximum.at(bottom, ids, rows + 1)
    kept = np.flatnonzero((areas > 0) & (areas >= min_area) & (np.arange(count) > 0))
    boxes = np.stack([left + right, top + bottom, 2 * (right - left), 2 * (bottom - top)], axis=1)[kept]
    shares = boxes / (2.0 * np.array([width, height, width, height]))
    lines = zip(kinds[kept].tolist(), shares.tolist(), strict=True)
    return [f"{kind} {' '.join(f'{value:.8f}' for value in box)}" for kind, box in lines]


def outline_lines(labels: "np.ndarray", kinds: "np.ndarray", min_area: int) -> list[str]:
    """`class x1 y1 x2 y2 ...` of each object, along pixel edges, as shares of the picture."""
    from polygons import trace_labels

    height, width = labels.shape
    lines = []
    for polygon in sorted(trace_labels(labels), key=lambda polygon: polygon.label):
        if polygon.area >= min_area:
            points = (polygon.exterior[:-1] / [width, height]).ravel().tolist()
            lines.append(f"{kinds[polygon.label]} {' '.join(f'{value:.6f}' for value in points)}")
    return lines


def place_picture(path: Path, image: "np.ndarray", folder: Path, name: str, *, copy: bool) -> None:
    """Link, copy or convert a picture into the set, atomically; another form of it that lay there goes."""
    import numpy as np

    from annotation.detectors import to_rgb8
    from annotation.placing import place_image
    from image_io import read_orientation, write_image

    folder.mkdir(parents=True, exist_ok=True)
    plain = path.suffix.lower() in LINKED and image.dtype == np.uint8 and image.shape[2] in (1, 3)
    plain = plain and read_orientation(path) == 1
    target = folder / f"{name}{path.suffix.lower() if plain else '.png'}"
    if plain:
        place_image(path, target, copy=copy)
    else:
        target.unlink(missing_ok=True)  # it may be a link to a picture, which must not be written over
        write_image(target, to_rgb8(image))
    for other in (folder / f"{name}{suffix}" for suffix in LINKED):
        if other != target:
            other.unlink(missing_ok=True)


def write_description(folder: Path, rules: Rules) -> None:
    """data.yaml, whose paths count from the folder it lies in."""
    from image_io import write_text

    names = "\n".join(f"  {number}: {json.dumps(name, ensure_ascii=False)}" for number, name in enumerate(rules.names))
    write_text(folder / "data.yaml", f"train: images/train\nval: images/val\nnames:\n{names}\n")


if __name__ == "__main__":
    main()
