"""Which files belong together: images, masks and extra channels of a split, by stem; splits by folder or by name."""

import csv
import hashlib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from image_io import IMAGE_SUFFIXES, list_images

MASK_DIRS = ("gt", "masks")
SPLITS = ("train", "val", "test")


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
        """Pairs of a data set without val/ as (train, val)."""
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
    images = list_images(folder / "images")
    if not images:
        raise DatasetError(f"{folder / 'images'} holds no images; expected png, jpg, tif, bmp, gif or webp files")
    mask_dir = next((name for name in MASK_DIRS if (folder / name).is_dir()), None)
    beside = {name: _list_beside(folder, name) for name in (*add_dirs, roi_dir, mask_dir) if name}
    unknown: frozenset[str] = frozenset()
    if wanted is not None:
        unknown = frozenset(wanted - images.keys())
        unknown -= {name for other in _siblings(folder) for name in list_images(other) if unknown}
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
    errors = [message for name, found in beside.items() for message in _unpaired(folder, name, images, found)]
    return Listing(folder, pairs, errors, has_masks=mask_dir is not None, unknown_ids=unknown)


def _list_beside(folder: Path, name: str) -> dict[str, Path]:
    if not (folder / name).is_dir():
        raise DatasetError(f"no folder {folder / name}, asked for as {name!r}; expected beside {folder / 'images'}")
    return list_images(folder / name)


def _siblings(folder: Path) -> list[Path]:
    """images/ of the other splits of the same data set."""
    if folder.name not in SPLITS:
        return []
    others = [folder.parent / name / "images" for name in SPLITS if name != folder.name]
    return [path for path in others if path.is_dir()]


def _unpaired(folder: Path, name: str, images: dict[str, Path], found: dict[str, Path]) -> list[str]:
    messages = []
    for have, lack, left, right in (("images", name, images, found), (name, "images", found, images)):
        missing = sorted(left.keys() - right.keys())
        if missing:
            messages.append(
                f"{len(missing)} of {len(left)} files in {folder / have} have no partner in {folder / lack}, "
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
    plain = (Path(name).stem if Path(name).suffix.lower() in IMAGE_SUFFIXES else name for name in names if name)
    return {unicodedata.normalize("NFC", name) for name in plain}


def share_by_name(pairs: Sequence[Pair], share: float, pattern: str | None) -> tuple[list[Pair], list[Pair]]:
    """Split pairs into (train, val); every group of names falls on one side.

    The choice depends on the names alone: groups are ranked by a hash, so it is the same everywhere.

    Raises:
        DatasetError: the pattern matches no name, or there are too few groups to split.
    """
    group_of = {pair.name: _group(pair.name, pattern) for pair in pairs}
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


def _group(name: str, pattern: str | None) -> str:
    if pattern is None:
        return name
    try:
        found = re.search(pattern, name)
    except re.error as error:
        raise DatasetError(f"--group-pattern {pattern!r} is not a regular expression: {error}") from error
    if found is None:
        raise DatasetError(f"--group-pattern {pattern!r} does not match the file name {name!r}")
    return (found.group(1) if found.groups() else None) or found.group(0)
