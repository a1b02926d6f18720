"""Which annotation belongs to which slide, and which mask values its classes get."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from image_io import IMAGE_SUFFIXES, ImageError, file_stem
from pairing import SHAPE_SUFFIXES, read_runs
from slide_io import Grid, Slide
from slide_masks import RUN_SUFFIX, MaskOptions, Raster, open_mask, strips_below

NO_CLASS = "none"  # how shapes without a class are called where classes are listed
OBJECT = 255
MAX_VALUE = 65535
FINDINGS = 20  # shapes of one file that are listed


@dataclass(frozen=True)
class LabelRule:
    """Which mask value an annotation gets.

    label: of every object; None is 255, and in mask files the values as they are. classes: (name, value) instead, by
    class of a shape, by class of run lengths, or by value of a mask file; value 0 leaves a class out.
    """

    label: int | None = None
    classes: tuple[tuple[str, int], ...] = ()

    def mask_options(self, max_decoded_gb: float = 4.0) -> MaskOptions:
        """How masks are opened for this rule."""
        left_out: set[str | None] = {name for name, value in self.classes if value == 0}
        if NO_CLASS in left_out:
            left_out.add(None)
        return MaskOptions(tuple(name for name, _ in self.classes), frozenset(left_out), max_decoded_gb)

    def dtype(self) -> np.dtype:
        """Type that holds the values."""
        highest = max(value for _, value in self.classes) if self.classes else self.label or OBJECT
        return np.dtype(np.uint8 if highest < 256 else np.uint16)

    def table(self, names: list[str | None] | None, annotation: "Annotation") -> np.ndarray | None:
        """Mask value of each value that an annotation has, 1-D int64; -1: no class takes it. None: they stay.

        Args:
            names: see slide_masks.MaskSource.

        Raises:
            ImageError: a class without a value; the file is named.
        """
        if names is not None:
            return np.array([0, *self._values(names, annotation)], np.int64)
        if self.label is None and not self.classes:
            return None
        table = np.full(MAX_VALUE + 1, -1 if self.classes else self.label, np.int64)
        table[0] = 0
        for name, value in self.classes:
            if not name.isdecimal() or int(name) > MAX_VALUE:
                raise ImageError(
                    f"the class {name!r} is no value of a mask file; expected such as 3=64, values 0 to {MAX_VALUE}"
                )
            table[int(name)] = value
        return table

    def _values(self, names: list[str | None], annotation: "Annotation") -> list[int]:
        if not self.classes:
            return [self.label or OBJECT] * len(names)
        values, path = dict(self.classes), annotation.path
        is_table = path.suffix.lower() == RUN_SUFFIX
        if is_table and None in names:
            raise ImageError(
                f"{path} has neither columns named {', '.join(values)} nor rows such as "
                f"{annotation.name}_{next(iter(values))}; expected one for each class, or give no classes"
            )
        unknown = sorted({name or NO_CLASS for name in names} - set(values))
        if unknown:
            raise ImageError(
                f"{path} has {'rows' if is_table else 'shapes'} of the classes {', '.join(unknown)}, which have no "
                f"value; expected {', '.join(values)}: give NAME=VALUE for each class, NAME=0 to leave it out"
            )
        return [values[name or NO_CLASS] for name in names]


@dataclass(frozen=True)
class Annotation:
    """Where the annotation of one slide is: a file, or the rows `name` of a csv file.

    signature changes when the annotation does.
    """

    path: Path
    name: str
    signature: str


class TileMask:
    """The labels of one slide on a grid, read by windows, as training straight from the slide sees them.

    findings: what of the annotation could not be used.
    """

    def __init__(
        self, annotation: Annotation, slide: Slide, grid: Grid, rule: LabelRule, max_decoded_gb: float = 4.0
    ) -> None:
        """Open the annotation.

        Raises:
            ImageError: it cannot be used at all; the message names it. OSError: it cannot be read.
        """
        self._path, self._slide = annotation.path, slide
        self._raster = Raster(grid.height, grid.width, grid.scale)
        options = rule.mask_options(max_decoded_gb)
        self._mask = open_mask(annotation.path, annotation.name, slide, self._raster, options)
        self._full = self._mask.at(Raster(slide.height, slide.width, 1.0))
        self._dtype, self._table = rule.dtype(), rule.table(self._mask.names, annotation)
        self.findings = [f"{text}; the rest of the file is used" for text in self._mask.findings]
        if len(self.findings) > FINDINGS:
            self.findings[FINDINGS:] = [f"{annotation.path}: {len(self.findings) - FINDINGS} more such findings"]

    def read(self, top: int, left: int, height: int, width: int) -> tuple[np.ndarray, bool]:
        """Labels (height, width) uint8 or uint16 of a window of the grid, and whether it covers anything annotated.

        What is too small to be a pixel of the grid is annotated too.

        Raises:
            ImageError: the mask file cannot be decoded there, or holds values that are no labels.
        """
        labels = self._labels(self._mask.read(top, left, height, width))
        if labels.any() or self._raster.scale == 1:
            return labels, bool(labels.any())
        strips = strips_below(self._full, self._slide, self._raster, (top, left, height, width))
        return labels, any(values.any() and self._labels(values).any() for values in strips)

    def _labels(self, values: np.ndarray) -> np.ndarray:
        if values.dtype.itemsize > 2:
            if values.max() > MAX_VALUE:
                raise ImageError(
                    f"{self._path} holds the values {values.min()} to {values.max()}; expected whole labels from 0 to "
                    f"{MAX_VALUE}: save it as uint8 or uint16"
                )
            values = values.astype(np.uint16)
        if self._table is None:
            return values
        mapped = self._table[values]
        if mapped.min() < 0:
            raise ImageError(
                f"{self._path} holds the values {np.unique(values[mapped < 0])[:8].tolist()}, which no class names; "
                f"expected {np.flatnonzero(self._table >= 0)[:20].tolist()}: give VALUE=NEW for each, VALUE=0 to "
                "leave it out"
            )
        return mapped.astype(self._dtype)

    def close(self) -> None:
        """Close the file."""
        self._mask.close()


# ----------------------------------------------------------------------------------------------------------------------
# Finding annotations


@dataclass
class Found:
    """The annotations of slides by id: sources, slides without a single one, and annotations without a slide."""

    sources: dict[str, Annotation]
    missing: dict[str, str]
    extra: dict[str, str]


def find_masks(path: Path, slides: Mapping[str, Path], rule: LabelRule) -> Found:
    """The annotation of each slide.

    Args:
        path: a csv file with run lengths, a folder of GeoJSON or mask files, or one such file for one slide.
        slides: id to file.

    Raises:
        FileNotFoundError: no such file or folder.
        DatasetError: a csv file without the columns. ImageError: one file for several slides.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected a csv file with run lengths, or a folder of masks")
    if path.is_dir():
        return _find_files(path, slides)
    if path.suffix.lower() == RUN_SUFFIX:
        return _find_rows(path, slides, rule.mask_options().classes)
    if len(slides) != 1:
        raise ImageError(
            f"{path} is one annotation for {len(slides)} slides; expected a csv file with a row, or a folder with a "
            "file, for each of them"
        )
    return Found({name: Annotation(path, name, file_signature(path)) for name in slides}, {}, {})


def _find_files(folder: Path, slides: Mapping[str, Path]) -> Found:
    files: dict[str, list[Path]] = {}
    own = {path.resolve() for path in slides.values()}
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        kind = path.suffix.lower()
        if path.name[0] == "." or kind not in (*SHAPE_SUFFIXES, *IMAGE_SUFFIXES) or path.resolve() in own:
            continue
        if kind != ".json" or file_stem(path) in slides:  # other programs leave settings in .json files
            files.setdefault(file_stem(path), []).append(path)
    found = Found({}, {}, {})
    for name, slide in slides.items():
        mine = files.get(name, [])
        if len(mine) == 1:
            found.sources[name] = Annotation(mine[0], name, file_signature(mine[0]))
        else:
            listed = f"{len(mine)} annotations, {' and '.join(path.name for path in mine)}," if mine else "none"
            found.missing[name] = (
                f"{slide} has {listed} in {folder}; expected one file named {name}.geojson, {name}.tif or {name}.png "
                "(an empty FeatureCollection says that nothing is there)"
            )
    for name in files.keys() - slides.keys():
        found.extra[name] = (
            f"{files[name][0]} belongs to no slide; expected a slide named {name}: give it too, or move the file away"
        )
    return found


def file_signature(path: Path) -> str:
    """Name, size and time of a file: another one means that its content may have changed."""
    state = path.stat()
    return f"{path.name} {state.st_size} {state.st_mtime_ns}"


def _find_rows(path: Path, slides: Mapping[str, Path], classes: tuple[str, ...]) -> Found:
    owners = {f"{name}_{kind}": name for name in slides for kind in classes} | {name: name for name in slides}
    digests: dict[str, dict[str | None, str]] = {}
    found = Found({}, {}, {})
    for name, kind, runs in read_runs(path, classes):
        if not name:
            continue
        kinds = digests.setdefault(name, {})
        if kind in kinds and name in owners:
            found.missing[owners[name]] = f"{path} has several rows {name!r}; expected one: join their runs"
        kinds[kind] = hashlib.sha256(f"{name}|{kind}|{runs}".encode()).hexdigest()[:32]
    for name, slide in slides.items():
        mine = [digest for row, kinds in digests.items() if owners.get(row) == name for digest in kinds.values()]
        if not mine:
            found.missing[name] = (
                f"{slide} has no row {name!r} in {path}; expected one (an empty encoding says that nothing is there)"
            )
        elif name not in found.missing:
            found.sources[name] = Annotation(path, name, " ".join(mine))
    for name in digests.keys() - owners.keys():
        found.extra[name] = (
            f"{path} has a row {name!r}, but no slide of this name was given (such as {name}.tiff): give it too, or "
            "take the row out"
        )
    return found
