"""Which files belong together: images, masks and extra channels of a split, by stem; splits by folder or by name."""

import csv
import hashlib
import re
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from image_io import IMAGE_SUFFIXES, file_stem, list_images
from slide_sources import OPENSLIDE_SUFFIXES

MASK_DIRS = ("gt", "masks")
SPLITS = ("train", "val", "test")
SLIDE_SUFFIXES = (".svs", ".ndpi", ".btf", *OPENSLIDE_SUFFIXES)
SHAPE_SUFFIXES = (".geojson", ".json")  # of masks that are drawn as polygons
RUN_COLUMNS = ("encoding", "rle", "predicted")  # what the column of run lengths may be called
CLASS_COLUMNS = ("class", "label")
LONGEST_CELL = 2**31 - 1  # characters of a csv cell; a slide has millions of runs


class DatasetError(ValueError):
    """The data set cannot be used; the message lists everything that is wrong."""


@dataclass(frozen=True)
class Pair:
    """One image, its mask and what belongs to it; all share the file stem `name`."""

    name: str
    image: Path
    mask: Path | None = None
    extras: tuple[Path, ...] = ()
    roi: Path | None = None

    @property
    def layers(self) -> list[Path]:
        """The image and its extra channels, in network order."""
        return [self.image, *self.extras]


@dataclass
class Listing:
    """The pairs of one split, and what is wrong with its folders.

    unknown_ids: names asked for with --ids that no file of this data set has.
    """

    folder: Path
    pairs: list[Pair]
    errors: list[str] = field(default_factory=list)
    has_masks: bool = True
    unknown_ids: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """Name of the data set: that of its root, so `water` for `water/val`."""
        folder = self.folder.resolve()
        return folder.parent.name if folder.name in SPLITS else folder.name


@dataclass(frozen=True)
class FileOptions:
    """Which files of a data set are used.

    add_dirs: folders beside images/ with one extra channel each. roi_dir: folder with the region that counts.
    ids: csv file that names the images to use. val_share and group_pattern: see share_by_name.
    """

    add_dirs: tuple[str, ...] = ()
    roi_dir: str | None = None
    ids: Path | None = None
    val_share: float = 0.2
    group_pattern: str | None = None

    def listing(self, folder: Path, ids: Path | None = None) -> Listing:
        """The pairs of one split folder; `ids` goes before self.ids."""
        return list_pairs(folder, self.add_dirs, self.roi_dir, ids or self.ids)

    def shared(self, pairs: Sequence[Pair]) -> tuple[list[Pair], list[Pair]]:
        """Pairs of a data set without val/ as (train, val).

        Raises:
            DatasetError: see share_by_name; also a share of 0, which checkpoints have whose training held out no share.
        """
        if not self.val_share:
            raise DatasetError(
                "the training of this network held out no share of the data set: it was cross-validated, or validated "
                "on other sets. For a fold give its images with --ids logs/NAME_fold_K/held_out.csv and no --split"
            )
        return share_by_name(pairs, self.val_share, self.group_pattern)


def split_folder(root: Path, split: str | None) -> Path | None:
    """The folder that holds images/ of a split, or None when `root` has no such split.

    Args:
        split: a name from SPLITS, or None for `root` itself.

    Raises:
        DatasetError: `root` is missing or holds neither images/ nor splits.
    """
    if not root.is_dir():
        raise DatasetError(f"no folder {root}; expected a data set with train/ and val/, or with images/ and gt/")
    folder = root / split if split else root
    if (folder / "images").is_dir():
        return folder
    if split and ((root / "images").is_dir() or _splits_of(root)):
        return None
    splits = _splits_of(root)
    if splits and not split:
        raise DatasetError(
            f"{root} has the splits {' '.join(splits)}; give the folder of one, such as {root / splits[-1]}"
        )
    found = f"the splits {' '.join(splits)}" if splits else "no images/ and no split in it"
    raise DatasetError(
        f"{root} has {found}. Expected {root}/images with {root}/gt, or {root}/train/images with {root}/train/gt; "
        "give one of these folders."
    )


def _splits_of(root: Path) -> list[str]:
    return sorted(path.parent.name for path in root.glob("*/images") if path.is_dir())


def _train_folder(root: Path) -> Path:
    """<root>/train, or `root` itself when it is flat."""
    folder = split_folder(root, "train")
    if folder is None and not (root / "images").is_dir():
        raise DatasetError(f"{root} has the splits {' '.join(_splits_of(root))}; expected {root}/train/images")
    return folder or root


def find_training(root: Path, options: FileOptions) -> Listing:
    """All pairs of <root>/train, or of a flat data set, with nothing held out.

    Raises:
        DatasetError: see split_folder and list_pairs.
    """
    listing = options.listing(_train_folder(root))
    if options.ids:
        _add_unknown(listing, options.ids, listing.unknown_ids)
    return listing


def find_further(paths: Sequence[Path], options: FileOptions) -> list[Listing]:
    """Further validation sets.

    Args:
        paths: split folders, or roots with val/, or .txt files with one of these in each line, relative to the file.
        options: channels and regions; its ids are of the data set itself and are not used here.

    Raises:
        DatasetError: a file without lines, and see split_folder and list_pairs.
    """
    folders: list[Path] = []
    for path in paths:
        folders += _listed_folders(path) if path.suffix.lower() == ".txt" and path.is_file() else [path]
    found = [(split_folder(folder, "val") or split_folder(folder, None) or folder) for folder in folders]
    return [list_pairs(folder, options.add_dirs, options.roi_dir) for folder in found]


def _listed_folders(path: Path) -> list[Path]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path} is not UTF-8 text; expected the folder of a validation set in each line") from error
    if not any(lines):
        raise DatasetError(f"{path} is empty; expected the folder of a validation set in each line")
    return [path.parent / line for line in lines if line]


def unique_names(names: Sequence[str]) -> list[str]:
    """The names with -2, -3, ... after those that were there before, so that no two are the same."""
    unique: list[str] = []
    for name in names:
        tries = (name, *(f"{name}-{number}" for number in range(2, len(names) + 2)))
        unique.append(next(each for each in tries if each not in unique))
    return unique


def find_splits(
    root: Path, options: FileOptions, *, val_dir: Path | None = None, val_ids: Path | None = None
) -> tuple[Listing, Listing, str]:
    """Training and validation pairs of a data set, and a sentence that says where they came from.

    Args:
        val_dir: a split folder, or a root with val/. val_ids: csv file that names the validation images.

    Raises:
        DatasetError: see split_folder, list_pairs and share_by_name.
    """
    train = options.listing(_train_folder(root))
    val_folder = (split_folder(val_dir, "val") or split_folder(val_dir, None)) if val_dir else split_folder(root, "val")
    if val_folder is not None:
        val = options.listing(val_folder, val_ids)
        note = f"validation on {val_folder}"
    elif val_ids is not None:
        val = options.listing(train.folder, val_ids)
        chosen = {pair.name for pair in val.pairs}
        train.pairs = [pair for pair in train.pairs if pair.name not in chosen]
        note = f"validation on the {len(val.pairs)} images of {val_ids}"
    else:
        total = len(train.pairs)
        train.pairs, held = options.shared(train.pairs)
        val = replace(train, pairs=held)
        note = f"no val/ in {root}: {len(held)} of {total} images, chosen by name, are kept for it"
    if options.ids:
        _add_unknown(train, options.ids, train.unknown_ids & val.unknown_ids if not val_ids else train.unknown_ids)
    if val_ids:
        _add_unknown(val, val_ids, val.unknown_ids)
    return train, val, note


def _add_unknown(listing: Listing, path: Path, names: frozenset[str]) -> None:
    if names:
        listing.errors.append(f"{len(names)} ids of {path} have no file in {listing.folder}, first: {min(names)!r}")


def find_split(path: Path, split: str | None, options: FileOptions) -> Listing:
    """The pairs of one split: `path` is its folder, or a root that holds it; a data set without val/ is split by name.

    Raises:
        DatasetError: as find_splits.
    """
    is_split = path.resolve().name == split and (path / "images").is_dir()
    folder = split_folder(path, None if is_split else split)
    if folder is not None:
        listing = options.listing(folder)
    elif split == "test":
        raise DatasetError(f"{path} has no test/images; expected it, or a folder with images/ and no --split")
    else:
        listing = options.listing(_train_folder(path))
        train, val = options.shared(listing.pairs)
        listing.pairs = train if split == "train" else val
    if options.ids:
        _add_unknown(listing, options.ids, listing.unknown_ids)
    return listing


def list_pairs(
    folder: Path, add_dirs: Sequence[str] = (), roi_dir: str | None = None, ids: Path | None = None
) -> Listing:
    """Pair the files of one split by stem; extensions may differ.

    Args:
        folder: holds images/, gt/ or masks/, and one folder for each of `add_dirs` and for `roi_dir`.
        ids: csv file that names the images to use, see read_ids; files of other names are not looked at.

    Raises:
        DatasetError: images/ is empty, or a folder that was asked for is missing.
    """
    wanted = read_ids(ids) if ids else None
    images = list_images(folder / "images", SLIDE_SUFFIXES)
    if not images:
        raise DatasetError(
            f"{folder / 'images'} holds no images; expected png, jpg, tif, bmp, gif or webp files, or slides"
        )
    mask_dir = next((name for name in MASK_DIRS if (folder / name).is_dir()), None)
    beside = {name: list_beside(folder / "images", name) for name in add_dirs}
    if roi_dir:
        beside[roi_dir] = list_beside(folder / "images", roi_dir, SHAPE_SUFFIXES[:1])
    if mask_dir:
        beside[mask_dir] = _list_masks(folder / mask_dir, images)
    unknown: frozenset[str] = frozenset()
    if wanted is not None:
        unknown = frozenset(wanted - images.keys())
        unknown -= {name for other in _siblings(folder) for name in list_images(other, SLIDE_SUFFIXES) if unknown}
        images = {stem: path for stem, path in images.items() if stem in wanted}
        beside = {name: {s: p for s, p in found.items() if s in wanted} for name, found in beside.items()}
    pairs = [
        Pair(
            stem,
            path,
            beside[mask_dir][stem] if mask_dir else None,
            tuple(beside[name][stem] for name in add_dirs),
            beside[roi_dir][stem] if roi_dir else None,
        )
        for stem, path in images.items()
        if all(stem in found for found in beside.values())
    ]
    errors = [message for name, found in beside.items() for message in unpaired(folder / "images", name, images, found)]
    return Listing(folder, pairs, errors, has_masks=mask_dir is not None, unknown_ids=unknown)


def list_beside(images_dir: Path, name: str, more: Sequence[str] = ()) -> dict[str, Path]:
    """The files by stem of the folder `name` beside a folder of images; more: suffixes that count as well.

    Raises:
        DatasetError: there is no such folder.
    """
    folder = images_dir.parent / name
    if not folder.is_dir():
        raise DatasetError(f"no folder {folder}, asked for as {name!r}; expected beside {images_dir}")
    return list_images(folder, (*SLIDE_SUFFIXES, *more))


def _list_masks(folder: Path, images: dict[str, Path]) -> dict[str, Path]:
    """Masks by stem: rasters and .geojson files; for images without one a .json file, or a row of the one csv table."""
    found = list_images(folder, SHAPE_SUFFIXES[:1])
    for path in sorted(folder.glob("*.json")):
        stem = file_stem(path)
        if stem in images and stem not in found:
            found[stem] = path
    if len(found.keys() & images.keys()) == len(images):
        return found
    tables = [path for path in sorted(folder.glob("*.csv")) if path.name[0] != "." and _is_run_table(path)]
    if len(tables) > 1:
        raise DatasetError(
            f"{folder} holds {len(tables)} tables of run lengths, {tables[0].name} and {tables[1].name}; expected one: "
            "put their rows into one file"
        )
    named = {name for table in tables for name, _, _ in read_runs(table)}
    return {**{stem: tables[0] for stem in images.keys() & named}, **found}


@dataclass(frozen=True)
class _RunTable:
    """The columns of a table of run lengths; runs: column to the class that it is named after, if any."""

    name: str
    runs: dict[str, str | None]
    kind: str | None
    delimiter: str


def _is_run_table(path: Path) -> bool:
    try:
        _run_columns(path, ())
    except (DatasetError, UnicodeDecodeError):
        return False
    return True


def _run_columns(path: Path, classes: Collection[str]) -> _RunTable:
    with path.open(newline="", encoding="utf-8-sig") as file:
        line = file.readline(4096)
    delimiter = ";" if line.count(";") > line.count(",") else ","
    columns = next(csv.reader([line], delimiter=delimiter), [])

    def first(names: Collection[str]) -> str | None:
        return next((column for column in columns if column.strip().lower() in names), None)

    name, one, kind = first(("id",)), first(RUN_COLUMNS), first(CLASS_COLUMNS)
    runs: dict[str, str | None] = {column: column.strip() for column in columns if column.strip() in classes}
    if not runs and one is not None:
        runs[one] = None
    if name is None or not runs:
        wanted = f"id and {RUN_COLUMNS[0]}" if name is None else f"one of {', '.join(RUN_COLUMNS)}"
        raise DatasetError(
            f"{path} is no table of run lengths: it has the columns {', '.join(columns)}; expected {wanted}"
        )
    return _RunTable(name, runs, kind, delimiter)


def read_runs(path: Path, classes: Collection[str] = ()) -> Iterator[tuple[str, str | None, str]]:
    """Rows of a table of run lengths: name of the image, class (None: the table does not say), runs.

    Args:
        classes: columns of these names hold the runs of that class, if there are such columns.

    Raises:
        DatasetError: no such table.
    """
    csv.field_size_limit(LONGEST_CELL)
    try:
        table = _run_columns(path, classes)
        with path.open(newline="", encoding="utf-8-sig") as file:
            for row in csv.DictReader(file, delimiter=table.delimiter):
                kind = (row[table.kind] or "").strip() or None if table.kind else None
                for column, own in table.runs.items():
                    yield _plain_name(row[table.name] or ""), own or kind, row[column] or ""
    except (UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{path} is not a csv file in UTF-8 ({error}); expected columns id and encoding") from error


def _plain_name(name: str) -> str:
    """An image's name as its files pair: without the suffix of an image, Unicode NFC."""
    path, composed = Path(name.strip()), unicodedata.normalize("NFC", name.strip())
    return file_stem(path) if path.suffix.lower() in (*IMAGE_SUFFIXES, *SLIDE_SUFFIXES) else composed


def _siblings(folder: Path) -> list[Path]:
    """images/ of the other splits of the same data set."""
    if folder.name not in SPLITS:
        return []
    others = [folder.parent / name / "images" for name in SPLITS if name != folder.name]
    return [path for path in others if path.is_dir()]


def unpaired(images_dir: Path, name: str, images: dict[str, Path], found: dict[str, Path]) -> list[str]:
    """What is wrong where images and the files found in the folder `name` beside them, by stem, are not the same."""
    messages, beside = [], images_dir.parent / name
    for have, lack, left, right in ((images_dir, beside, images, found), (beside, images_dir, found, images)):
        missing = sorted(left.keys() - right.keys())
        if missing:
            messages.append(
                f"{len(missing)} of {len(left)} files in {have} have no partner in {lack}, "
                f"first: {missing[0]!r}. Files pair by stem."
            )
    return messages


def read_ids(path: Path) -> set[str]:
    """Image names from column `id` of a csv file; the extension of an image file in them is dropped.

    Raises:
        DatasetError: the file is missing, is no text, or has no such column.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            sample = file.read(4096)
            file.seek(0)
            rows = csv.DictReader(file, delimiter=";" if sample.count(";") > sample.count(",") else ",")
            if "id" not in (rows.fieldnames or []):
                raise DatasetError(f"{path} has the columns {rows.fieldnames}; expected one named id")
            names = [(row["id"] or "").strip() for row in rows]
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror}; expected a csv file with a column id") from error
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path} is not UTF-8 text; expected a csv file with a column id") from error
    return {_plain_name(name) for name in names if name}


def share_by_name(pairs: Sequence[Pair], share: float, pattern: str | None) -> tuple[list[Pair], list[Pair]]:
    """Split pairs into (train, val); every group of names falls on one side.

    The choice depends on the names alone: groups are ranked by a hash, so it is the same everywhere.

    Raises:
        DatasetError: the pattern matches no name, or there are too few groups to split.
    """
    group_of = {pair.name: group_name(pair.name, pattern) for pair in pairs}
    groups = sorted(set(group_of.values()), key=lambda name: hashlib.sha256(name.encode()).digest())
    if len(groups) < 2:
        why = (
            f"--group-pattern {pattern!r} puts all {len(pairs)} images into one group"
            if pattern
            else f"images: {len(pairs)}"
        )
        raise DatasetError(f"{len(groups)} group of images cannot be split into train and val ({why}); give --val-dir")
    chosen = set(groups[: min(max(1, round(share * len(groups))), len(groups) - 1)])
    sides: tuple[list[Pair], list[Pair]] = ([], [])
    for pair in pairs:
        sides[group_of[pair.name] in chosen].append(pair)
    return sides


def group_name(name: str, pattern: str | None) -> str:
    """The group that an image's name belongs to: what the pattern's first group finds; without a pattern the name.

    Raises:
        DatasetError: no regular expression, or one that the name does not match.
    """
    if pattern is None:
        return name
    try:
        found = re.search(pattern, name)
    except re.error as error:
        raise DatasetError(f"--group-pattern {pattern!r} is not a regular expression: {error}") from error
    if found is None:
        raise DatasetError(f"--group-pattern {pattern!r} does not match the file name {name!r}")
    return (found.group(1) if found.groups() else None) or found.group(0)
