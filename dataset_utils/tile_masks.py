"""Masks of tiles from run lengths, polygons or mask files: windows, never the mask of a whole slide.

Annotations are in pixels of the full resolution. Masks of a coarser grid go by area: a pixel is labelled where
labels cover at least half of it, with the label that covers most, so that small objects do not come and go with the
place of a sampling point.
"""

import csv
import hashlib
import math
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from geojson import check_inside, read_geojson
from image_io import IMAGE_SUFFIXES, ImageError, read_mask
from polygons import ShapeIndex
from rle import RleRaster
from slide_io import Slide, open_slide

RLE_COLUMNS = ("encoding", "rle", "predicted")
GEOJSON_SUFFIXES = (".geojson", ".json")
NO_CLASS = "none"  # how shapes without a class are called where classes are listed
OBJECT = 255
MAX_VALUE = 65535
STRIP_PIXELS = 1 << 22  # of full resolution that are turned into pixels of a grid at once
FINDINGS = 20  # shapes of one file that are listed

ReadLabels = Callable[[int, int, int, int], np.ndarray]


@dataclass(frozen=True)
class LabelRule:
    """Which mask value an annotation gets.

    label: of every object; None is 255, and in mask files the values as they are. classes: (name, value) instead, by
    class of a shape, by column or row ending of a csv file, or by value of a mask file; value 0 leaves a class out.
    """

    label: int | None = None
    classes: tuple[tuple[str, int], ...] = ()

    def table(self) -> dict[str, int]:
        """Class name to value."""
        return dict(self.classes)

    def dtype(self) -> np.dtype:
        """Type that holds the values."""
        highest = max(value for _, value in self.classes) if self.classes else self.label or OBJECT
        return np.dtype(np.uint8 if highest < 256 else np.uint16)


@dataclass(frozen=True)
class MaskSource:
    """Where the annotation of one slide is: a "geojson" or "raster" file, or the row `name` of an "rle" csv file.

    signature changes when the annotation does.
    """

    kind: str
    path: Path
    name: str
    signature: str


class TileMask:
    """The labels of one slide, read by windows.

    findings: what of the annotation could not be used. dtype: of the labels.
    """

    def __init__(
        self,
        slide: Slide,
        dtype: np.dtype,
        read: ReadLabels,
        findings: list[str],
        close: Callable[[], None] = lambda: None,
    ) -> None:
        """Args: slide: whose pixels the labels lie on; read: labels of a window; close: called once at the end."""
        self.height, self.width = slide.height, slide.width
        self.dtype, self.findings = dtype, findings
        self._read, self.close = read, close

    def read(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        """Labels (height, width) of a window of the full resolution.

        Raises:
            ImageError: the mask file cannot be decoded there, or holds values that are no labels.
        """
        return self._read(top, left, height, width).astype(self.dtype, copy=False)

    def read_grid(self, top: int, left: int, height: int, width: int, scale: float) -> tuple[np.ndarray, bool]:
        """Labels (height, width) of a window of the slide's grid of `scale`; see the head of this module.

        Returns:
            The labels, and whether anything is annotated below the window, however small.

        Raises:
            ImageError: as read.
        """
        if scale == 1:
            labels = self.read(top, left, height, width)
            return labels, bool(labels.any())
        rows, columns = _footprints(top, height, scale, self.height), _footprints(left, width, scale, self.width)
        result: np.ndarray = np.zeros((height, width), self.dtype)
        annotated = False
        x, right = int(columns[0, 0]), math.ceil(columns[-1, 1])
        step = max(1, int(STRIP_PIXELS / ((right - x) * scale)))
        for first in range(0, height, step):
            strip = rows[first : first + step]
            y, bottom = int(strip[0, 0]), math.ceil(strip[-1, 1])
            labels = self.read(y, x, bottom - y, right - x)
            if labels.any():
                annotated = True
                result[first : first + step] = shrink_labels(labels, strip - y, columns - x)
        return result, annotated


def _footprints(first: int, count: int, scale: float, size: int) -> np.ndarray:
    """Begin and end in full-resolution pixels of some pixels of a grid along one axis, (count, 2) float64."""
    edges = np.minimum(np.arange(first, first + count + 1) * scale, size)
    begin = np.minimum(edges[:-1], size - 1)
    return np.stack([begin, np.where(edges[1:] > begin, edges[1:], begin + 1)], axis=1)


def shrink_labels(labels: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Labels by area: the label that covers most of a pixel where labels cover at least half of it, else 0.

    Args:
        labels: (h, w) unsigned. rows, columns: (n, 2) and (m, 2), begin and end of each new pixel.

    Returns:
        (n, m) of the same type; of labels that cover the same area the smallest.
    """
    total = np.outer(rows[:, 1] - rows[:, 0], columns[:, 1] - columns[:, 0])
    covered, most = np.zeros(total.shape), np.zeros(total.shape)
    result: np.ndarray = np.zeros(total.shape, labels.dtype)
    for value in np.flatnonzero(np.bincount(labels.ravel())[1:]) + 1:
        part = _integrate(_integrate(labels == value, rows).T, columns).T
        result[part > most] = value
        most = np.maximum(most, part)
        covered += part
    result[covered < total * (0.5 - 1e-9)] = 0
    return result


def _integrate(values: np.ndarray, spans: np.ndarray) -> np.ndarray:
    """Integrals of (n, m) values along the first axis over spans (k, 2): (k, m)."""
    kind: type = np.int32 if values.dtype == bool else np.float64
    sums: np.ndarray = np.zeros((len(values) + 1, values.shape[1]), kind)
    np.cumsum(values, axis=0, dtype=kind, out=sums[1:])
    whole = np.floor(spans).astype(np.int64)
    parts = (spans - whole)[..., None]
    upto = sums[whole].astype(np.float64)
    if parts.any():
        upto += parts * values[np.minimum(whole, len(values) - 1)]
    return upto[:, 1] - upto[:, 0]


# ----------------------------------------------------------------------------------------------------------------------
# Finding annotations


@dataclass
class Found:
    """The annotations of slides by id: sources, slides without a single one, and annotations without a slide."""

    sources: dict[str, MaskSource]
    missing: dict[str, str]
    extra: dict[str, str]


def slide_id(path: Path) -> str:
    """What a slide and its annotation share: the file's stem, without the .ome of .ome.tif."""
    stem = unicodedata.normalize("NFC", path.stem)
    return stem[:-4] if stem.lower().endswith(".ome") else stem


def find_masks(path: Path, slides: Mapping[str, Path], rule: LabelRule) -> Found:
    """The annotation of each slide.

    Args:
        path: a csv file with run lengths, a folder of GeoJSON or mask files, or one such file for one slide.
        slides: id to file.

    Raises:
        FileNotFoundError: no such file or folder.
        ImageError: a csv file without the columns, or one file for several slides.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected a csv file with run lengths, or a folder of masks")
    if path.is_dir():
        return _find_files(path, slides)
    if path.suffix.lower() == ".csv":
        return _find_rows(path, slides, rule)
    if len(slides) != 1:
        raise ImageError(
            f"{path} is one annotation for {len(slides)} slides; expected a csv file with a row, or a folder with a "
            "file, for each of them"
        )
    return Found({name: _file_source(path, name) for name in slides}, {}, {})


def _find_files(folder: Path, slides: Mapping[str, Path]) -> Found:
    files: dict[str, list[Path]] = {}
    own = {path.resolve() for path in slides.values()}
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        kind = path.suffix.lower()
        if path.name[0] == "." or kind not in (*GEOJSON_SUFFIXES, *IMAGE_SUFFIXES) or path.resolve() in own:
            continue
        if kind != ".json" or slide_id(path) in slides:  # other programs leave settings in .json files
            files.setdefault(slide_id(path), []).append(path)
    found = Found({}, {}, {})
    for name, slide in slides.items():
        mine = files.get(name, [])
        if len(mine) == 1:
            found.sources[name] = _file_source(mine[0], name)
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


def _file_source(path: Path, name: str) -> MaskSource:
    kind = "geojson" if path.suffix.lower() in GEOJSON_SUFFIXES else "raster"
    return MaskSource(kind, path, name, file_signature(path))


def file_signature(path: Path) -> str:
    """Name, size and time of a file: another one means that its content may have changed."""
    state = path.stat()
    return f"{path.name} {state.st_size} {state.st_mtime_ns}"


def _find_rows(path: Path, slides: Mapping[str, Path], rule: LabelRule) -> Found:
    owners = {f"{name}_{kind}": name for name in slides for kind in rule.table()} | {name: name for name in slides}
    digests: dict[str, list[str]] = {}
    found = Found({}, {}, {})
    for name, cells in _read_rows(path):
        text = "|".join([name, *(f"{key}={value}" for key, value in sorted(cells.items()))])
        digest = hashlib.sha256(text.encode()).hexdigest()[:32]
        if name in digests and name in owners:
            found.missing[owners[name]] = f"{path} has several rows {name!r}; expected one: join their runs"
        digests.setdefault(name, []).append(digest)
    for name, slide in slides.items():
        mine = [digest for row, parts in digests.items() if owners.get(row) == name for digest in parts]
        if not mine:
            found.missing[name] = (
                f"{slide} has no row {name!r} in {path}; expected one (an empty encoding says that nothing is there)"
            )
        elif name not in found.missing:
            found.sources[name] = MaskSource("rle", path, name, " ".join(mine))
    for name in digests.keys() - owners.keys():
        found.extra[name] = (
            f"{path} has a row {name!r}, but no slide of this name was given (such as {name}.tiff): give it too, or "
            "take the row out"
        )
    return found


def _read_rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """The id and the other cells, column to text, of each row of a csv file."""
    csv.field_size_limit(2**31 - 1)  # run lengths of a slide are megabytes
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            head = file.readline()
            file.seek(0)
            rows = csv.DictReader(file, delimiter=";" if head.count(";") > head.count(",") else ",")
            if "id" not in (rows.fieldnames or []) or len(rows.fieldnames or []) < 2:
                raise ImageError(
                    f"{path} has the columns {rows.fieldnames}; expected id and {' or '.join(RLE_COLUMNS)}"
                )
            for row in rows:
                name = (row.pop("id") or "").strip()
                if Path(name).suffix.lower() in (*IMAGE_SUFFIXES, ".svs"):
                    name = Path(name).stem
                if name:
                    yield unicodedata.normalize("NFC", name), {k: v or "" for k, v in row.items() if k is not None}
    except (UnicodeDecodeError, csv.Error) as error:
        raise ImageError(f"{path} is not a csv file in UTF-8 ({error}); expected columns id and encoding") from error


# ----------------------------------------------------------------------------------------------------------------------
# Opening them


def open_mask(source: MaskSource, slide: Slide, rule: LabelRule, max_decoded_gb: float = 4.0) -> TileMask:
    """Open the annotation of a slide; the slide gives the size that it must have.

    Raises:
        ImageError: the annotation cannot be used at all; the message names it.
        OSError: it cannot be read.
    """
    if source.kind == "rle":
        return _open_rle(source, slide, rule)
    if source.kind == "geojson":
        return _open_geojson(source, slide, rule)
    return _open_raster(source, slide, rule, max_decoded_gb)


def _open_rle(source: MaskSource, slide: Slide, rule: LabelRule) -> TileMask:
    rasters = []
    for name, value, text in _rle_cells(source, rule):
        try:
            rasters.append((value, RleRaster(text, slide.height, slide.width)))
        except ValueError as error:
            raise ImageError(f"{source.path}, {name}, of the slide {slide.path}: {error}") from error
    dtype = rule.dtype()

    def read(top: int, left: int, height: int, width: int) -> np.ndarray:
        labels: np.ndarray = np.zeros((height, width), dtype)
        for value, raster in rasters:
            labels[raster.read(top, left, height, width)] = value
        return labels

    return TileMask(slide, dtype, read, [])


def _rle_cells(source: MaskSource, rule: LabelRule) -> list[tuple[str, int, str]]:
    """The texts of one slide: where each stands, its mask value and its runs; later classes lie on top."""
    table = rule.table()
    rows = {name: cells for name, cells in _read_rows(source.path) if name.startswith(source.name)}
    if not table:
        cells = rows[source.name]
        column = next((column for column in RLE_COLUMNS if column in cells), None)
        if column is None:
            raise ImageError(
                f"{source.path} has the columns id, {', '.join(cells)}; expected one of {', '.join(RLE_COLUMNS)}, or "
                "classes that are named like the columns"
            )
        return [(f"row {source.name!r}", rule.label or OBJECT, cells[column])]
    texts = []
    for kind, value in table.items():
        if kind in rows.get(source.name, {}):
            texts.append((f"row {source.name!r}, column {kind}", value, rows[source.name][kind]))
        row = rows.get(f"{source.name}_{kind}", {})
        texts += [(f"row {source.name}_{kind}", value, row[column]) for column in RLE_COLUMNS if column in row]
    if not texts:
        raise ImageError(
            f"{source.path} has neither columns named {', '.join(table)} nor rows such as "
            f"{source.name}_{next(iter(table))}; expected one for each class, or give no classes"
        )
    return texts


def _open_geojson(source: MaskSource, slide: Slide, rule: LabelRule) -> TileMask:
    shapes, findings = read_geojson(source.path)
    outside = check_inside(shapes, slide.height, slide.width)
    if outside and sum("wholly" in finding.problem for finding in outside) == len(shapes):
        raise ImageError(f"{source.path}: no shape lies on {slide.path}; {outside[0]}")
    problems = [f"{source.path}: {finding}; the rest of the file is used" for finding in (*findings, *outside)]
    if len(problems) > FINDINGS:
        problems[FINDINGS:] = [f"{source.path}: {len(problems) - FINDINGS} more such findings"]
    table = rule.table() or {shape.name or NO_CLASS: rule.label or OBJECT for shape in shapes}
    unknown = {shape.name or NO_CLASS for shape in shapes} - set(table)
    if unknown:
        raise ImageError(
            f"{source.path} has shapes of the classes {', '.join(sorted(unknown))}, which have no value; expected "
            f"{', '.join(table)}: give NAME=VALUE for each class, NAME=0 to leave it out"
        )
    values: dict[str | None, int] = {shape.name: table[shape.name or NO_CLASS] for shape in shapes}
    index = ShapeIndex([shape for shape in shapes if values[shape.name]])

    def read(top: int, left: int, height: int, width: int) -> np.ndarray:
        return index.rasterise_classes(values, top, left, height, width)

    return TileMask(slide, rule.dtype(), read, problems)


def _open_raster(source: MaskSource, slide: Slide, rule: LabelRule, max_decoded_gb: float) -> TileMask:
    raster = open_slide(source.path, max_decoded_gb=max_decoded_gb)
    if (raster.height, raster.width) != (slide.height, slide.width):
        raster.close()
        raise ImageError(
            f"{source.path} is {raster.height}x{raster.width}, its slide {slide.path} is {slide.height}x{slide.width}; "
            "expected a mask of the slide's full resolution: enlarge it, or export it at that size"
        )
    reader: _RasterReader | _WholeReader
    if source.path.suffix.lower() in (".tif", ".tiff"):
        reader = _RasterReader(source.path, raster)
    else:
        raster.close()
        reader = _WholeReader(source.path)
    if rule.label is None and not rule.classes:
        return TileMask(slide, reader.dtype, reader, reader.findings, raster.close)
    table = _value_table(rule)

    def read(top: int, left: int, height: int, width: int) -> np.ndarray:
        return _map_values(reader(top, left, height, width), table, source.path)

    return TileMask(slide, rule.dtype(), read, reader.findings, raster.close)


class _WholeReader:
    """Windows of a mask in a format that is decoded whole anyway; palettes give labels this way."""

    def __init__(self, path: Path) -> None:
        self.mask, self.findings = read_mask(path), list[str]()
        self.dtype = self.mask.dtype

    def __call__(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        return self.mask[top : top + height, left : left + width]


class _RasterReader:
    """Windows of labels from a mask TIFF."""

    def __init__(self, path: Path, slide: Slide) -> None:
        grid = slide.grid()
        self.path, self.slide, self.grid, self.findings = path, slide, grid, grid.damage
        self.dtype = np.dtype(np.uint8 if grid.dtype == np.uint8 else np.uint16)

    def __call__(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        pixels = self.grid.read(top, left, height, width)
        if self.grid.damage and self.grid.valid(top, left, height, width) is not None:
            raise ImageError(self.grid.damage[-1])
        labels = pixels[..., 0]
        if pixels.shape[2] not in (1, 3) or any((pixels[..., c] != labels).any() for c in range(1, pixels.shape[2])):
            raise ImageError(
                f"{self.path} has {pixels.shape[2]} channels that differ (colours); expected one label for each pixel: "
                "save one channel of labels"
            )
        if labels.dtype.kind != "f":
            return labels
        if labels.min() < 0 or labels.max() > MAX_VALUE or (labels != np.rint(labels)).any():
            raise ImageError(
                f"{self.path} holds the values {labels.min():g} to {labels.max():g}; expected whole labels from 0 to "
                f"{MAX_VALUE}: save it as uint8 or uint16"
            )
        return labels.astype(np.uint16)


def _value_table(rule: LabelRule) -> np.ndarray:
    """New value of each value of a mask file, (65536,) int64; -1 where there is none."""
    table = np.full(MAX_VALUE + 1, -1 if rule.classes else rule.label, np.int64)
    table[0] = 0
    for name, value in rule.classes:
        if not name.isdecimal() or int(name) > MAX_VALUE:
            raise ImageError(f"the class {name!r} is no value of a mask file; expected such as 3=64, values 0 to 65535")
        table[int(name)] = value
    return table


def _map_values(labels: np.ndarray, table: np.ndarray, path: Path) -> np.ndarray:
    mapped = table[labels]
    if (mapped < 0).any():
        raise ImageError(
            f"{path} holds the values {np.unique(labels[mapped < 0])[:8].tolist()}, which no class names; expected "
            f"{np.flatnonzero(table >= 0)[:20].tolist()}: give VALUE=NEW for each, VALUE=0 to leave it out"
        )
    return mapped
