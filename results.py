"""Bands of probabilities -> files: masks, probabilities, overlays, label maps, polygons and run lengths of one picture.

What is large goes through a spool on disk (slide_writer), so a killed command goes on where it stopped and memory does
not grow with height; pictures that fit a PNG stay in memory. Objects are found in a second pass over the spooled mask.
"""

import errno
import json
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from checkpoint import ModelConfig
from cli import UsageError
from geojson import GeoJsonWriter
from image_io import ImageError, atomic_write, write_image, write_mask, write_text
from outputs import decide, label_values
from plots import class_colours, overlay
from polygons import trace_bands
from postprocess import Filters, filter_bands, filter_objects
from regions import Bands, Objects, label_bands, object_table
from result_record import OBJECT_KINDS, RASTERS
from rle import RleEncoder
from slide_io import Georeference
from slide_writer import Job, Layer, open_job, required_disk
from tables import format_csv

KINDS = ("mask", "prob", "overlay", "labels", "geojson", "rle")
FORMATS = ("auto", "png", "tiff", "ome", "flat")
PNG_PIXELS = 50_000_000  # larger results are TIFF unless PNG was asked for
OVERLAY_SIDE, PICTURE_SIDE = 4096, 1024  # longest side of saved overlays, and of those in TensorBoard


@dataclass(frozen=True)
class ResultOptions:
    """What is written, where, and how probabilities become objects.

    kinds: some of KINDS. form: one of FORMATS; auto is PNG for results up to PNG_PIXELS without map coordinates, else
    a pyramid. threshold: object where p >= threshold (one class). geo: polygons in map coordinates.
    """

    folder: Path
    kinds: tuple[str, ...] = ("mask",)
    form: str = "auto"
    threshold: float = 0.5
    filters: Filters = Filters()
    decimal: str = "comma"
    geo: bool = False


@dataclass(frozen=True)
class Frame:
    """The raster that the results of one picture lie on.

    scale: level-0 pixels for each pixel. mpp: micrometres per pixel, (x, y), or None. geo: map coordinates of level 0.
    """

    name: str
    height: int
    width: int
    scale: float = 1.0
    mpp: tuple[float, float] | None = None
    geo: Georeference | None = None


@dataclass
class Summary:
    """What came out of one picture: files, the share of each class, objects of each class (None: not counted)."""

    files: list[Path] = field(default_factory=list)
    shares: dict[str, float] = field(default_factory=dict)
    objects: dict[str, int] | None = None
    picture: np.ndarray | None = None

    def text(self) -> str:
        """One line for the terminal."""
        parts = [f"{name} {share:.1%}" for name, share in self.shares.items()]
        if self.objects is not None:
            counts = self.objects.items()
            parts += (
                [f"{sum(self.objects.values())} objects"] if len(counts) == 1 else [f"{n} x {k}" for k, n in counts]
            )
        return ", ".join(parts)


def filters_of(flags: Any) -> Filters:
    """The filters of cli.add_filter_args.

    Raises:
        UsageError: a number is out of its range.
    """
    try:
        return Filters(**{item.name: getattr(flags, item.name) for item in fields(Filters)})
    except ValueError as error:
        name = str(error).split()[0]
        raise UsageError(str(error).replace(name, f"--{name.replace('_', '-')}", 1)) from error


class MemoryStore:
    """Rows of layers kept in memory, with the interface of slide_writer.Job."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.rows_done = 0
        self.layers = {layer.name: layer for layer in layers}
        self.arrays = {
            layer.name: np.zeros((layer.height, layer.width, *([layer.bands] if layer.bands > 1 else [])), layer.kind)
            for layer in layers
        }

    def append(self, rows: dict[str, np.ndarray]) -> None:
        """The next rows of every layer."""
        height = len(next(iter(rows.values())))
        for name, values in rows.items():
            self.arrays[name][self.rows_done : self.rows_done + height] = values
        self.rows_done += height

    def bands(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        """The whole layer as one band."""
        yield 0, self.arrays[name]

    def remove(self) -> None:
        """Forget everything."""
        self.arrays.clear()

    close = remove


class Results:
    """The files of one picture in the making: add() every band from first_row on, then finish(). A context manager."""

    def __init__(self, frame: Frame, config: ModelConfig, options: ResultOptions, digest: str) -> None:
        self.frame, self.config, self.options, self.digest = frame, config, options, digest
        self.form = choose_form(frame, options)
        check_geo(frame, options)
        self.values = label_values(np.arange(len(config.class_names), dtype=np.uint8), config)
        self.stores: list[Job | MemoryStore] = []
        self.store = self._open_store("predicted", first_layers(frame, config, options))
        self.damage = self._damage_before()  # what could not be decoded

    def __enter__(self) -> "Results":
        return self

    def __exit__(self, *_: object) -> None:
        for store in self.stores:
            store.close()

    @property
    def first_row(self) -> int:
        """Rows above it are safe."""
        return self.store.rows_done

    @property
    def folder(self) -> Path:
        """The hidden working folder of this picture."""
        return working_folder(self.options.folder, self.frame.name)

    def _open_store(self, name: str, layers: Sequence[Layer]) -> Job | MemoryStore:
        memory = self.form == "png"
        self.stores.append(MemoryStore(layers) if memory else open_job(self.folder / name, self.digest, layers))
        return self.stores[-1]

    def add(self, probs: np.ndarray) -> None:
        """Take the next rows: probabilities (K, h, W) float32."""
        rows = {"mask": look_up(self.values, decide(probs, self.options.threshold))}
        if "prob" in self.store.layers:
            rows["prob"] = quantise(probs, self.store.layers["prob"].kind)
        self.store.append(rows)

    def finish(
        self,
        picture_of: Callable[[int], np.ndarray] | None = None,
        *,
        with_picture: bool = False,
        side: int = PICTURE_SIDE,
    ) -> Summary:
        """Write all files that were asked for, and forget the spool.

        Args:
            picture_of: the image (h, w, C) with one pixel for every n x n of the frame, for overlays; takes n.
            with_picture: also leave an overlay in the summary, no longer than `side` pixels.
        """
        kinds, summary = set(self.options.kinds), Summary()
        last = self._second_pass(summary)
        holder = {kind: last if kind in last.layers else self.store for kind in RASTERS}
        for kind, folder in RASTERS.items():
            if kind in kinds:
                summary.files.append(self._write(holder[kind], kind, folder))
        if picture_of and "overlay" in kinds:
            path = self.options.folder / "overlays" / f"{self.frame.name}.png"
            with self._placed(path) as waiting:
                write_image(waiting, self._overlay(holder["mask"], picture_of, OVERLAY_SIDE))
            summary.files.append(path)
        if picture_of and with_picture:
            summary.picture = self._overlay(holder["mask"], picture_of, side)
        return summary

    def remove(self) -> None:
        """Delete the working folder; when the files are there and noted down."""
        for store in self.stores:
            store.remove()
        shutil.rmtree(self.folder, ignore_errors=True)

    def note_damage(self, messages: Sequence[str]) -> None:
        """Keep what could not be decoded until now, for a run that goes on below it would not meet it again."""
        if set(messages) <= set(self.damage):
            return
        self.damage = [*dict.fromkeys([*self.damage, *messages])]
        if self.form != "png":
            write_text(self.folder / "damage.json", json.dumps([self.digest, self.damage], ensure_ascii=False))

    def _damage_before(self) -> list[str]:
        """What an earlier run noted about the rows that this one does not read again."""
        path = self.folder / "damage.json"
        if not self.first_row or not path.is_file():
            return []
        digest, messages = json.loads(path.read_text(encoding="utf-8"))
        return messages if digest == self.digest else []

    @contextmanager
    def _placed(self, path: Path) -> Iterator[Path]:
        """Where to write a file that then moves to `path`; what a kill leaves behind is in the working folder."""
        if self.form == "png":
            yield path
            return
        yield self.folder / path.name
        path.parent.mkdir(parents=True, exist_ok=True)
        (self.folder / path.name).replace(path)

    # ------------------------------------------------------------------------------------------------------------------
    # Everything that needs whole objects: filters, label maps, polygons, run lengths

    def class_bands(self) -> Iterator[tuple[int, np.ndarray]]:
        """The predicted mask as bands of class indices (h, W) uint8, the same each time."""
        yield from self._indices(self.store)

    def _indices(self, store: Job | MemoryStore) -> Iterator[tuple[int, np.ndarray]]:
        table = np.zeros(int(self.values.max()) + 1, np.uint8)
        table[self.values] = np.arange(len(self.values))
        for top, values in store.bands("mask"):
            yield top, look_up(table, values)

    def _second_pass(self, summary: Summary) -> Job | MemoryStore:
        """Filter and number the predicted mask and write what follows; the store that holds the final mask."""
        filters, kinds = self.options.filters, set(self.options.kinds)
        layers = second_layers(self.frame, self.config, self.options)
        if self.form != "png" and layers:
            shutil.rmtree(self.folder / "final", ignore_errors=True)  # half of a pass that was killed is not used
        last = self._open_store("final", layers) if layers else self.store
        bands: Bands = self.class_bands
        objects: Objects | None = None
        if kinds & OBJECT_KINDS:
            bands, objects = filter_objects(bands, filters)
        else:
            bands = filter_bands(bands, filters)
        counts = np.zeros(len(self.values), np.int64)
        numbered = label_bands(bands, objects) if objects is not None else bands()
        with ExitStack() as stack:
            runs = stack.enter_context(self._run_lengths(summary)) if "rle" in kinds else None

            def passing() -> Iterator[tuple[int, np.ndarray]]:
                """Hand on the bands, and give every writer its part of them."""
                class_of = None if objects is None else np.concatenate([[0], objects.class_index]).astype(np.uint8)
                for top, band in numbered:
                    classes = band if class_of is None else class_of[band]
                    counts[:] += [np.count_nonzero(classes == k) for k in range(len(counts))]
                    if layers:
                        rows = {"mask": look_up(self.values, classes), "labels": band}
                        last.append({layer.name: rows[layer.name] for layer in layers})
                    if runs:
                        runs.append(classes)
                    yield top, band

            if objects is not None and "geojson" in kinds:
                self._write_polygons(passing(), objects, summary)
            else:
                deque(passing(), maxlen=0)
        names = self.config.class_names
        shown = range(1 if names[0] == "background" else 0, len(names))
        summary.shares = {names[k]: counts[k] / max(counts.sum(), 1) for k in shown}
        if objects is not None:
            found = np.bincount(objects.class_index, minlength=len(names))
            summary.objects = {names[k]: int(found[k]) for k in shown if k}
            summary.files.append(self._write_table(objects))
        return last

    @contextmanager
    def _run_lengths(self, summary: Summary) -> Iterator["RunLengthFile"]:
        """Takes the rows, and becomes a file when the block ends well."""
        names = {k: name for k, name in enumerate(self.config.class_names) if k or name != "background"}
        ids = {k: self.frame.name if len(names) == 1 else f"{self.frame.name}_{name}" for k, name in names.items()}
        runs = RunLengthFile(self.frame.height, self.frame.width, ids)
        yield runs
        path = self.options.folder / "rle" / f"{self.frame.name}.csv"
        with self._placed(path) as waiting:
            runs.write(waiting)
        summary.files.append(path)

    def _write_polygons(self, numbered: Iterable[tuple[int, np.ndarray]], objects: Objects, summary: Summary) -> None:
        """One feature for each object, written when it is complete."""
        path = self.options.folder / "geojson" / f"{self.frame.name}.geojson"
        names, geo = self.config.class_names, self.frame.geo if self.options.geo else None
        colours = {name: colour for name, colour in zip(names, class_colours(names), strict=True) if colour}
        diameters = objects.equivalent_diameter
        with (
            self._placed(path) as waiting,
            GeoJsonWriter(
                waiting,
                scale=self.frame.scale,
                affine=geo.affine() if geo else None,
                epsg=geo.epsg() if geo else None,
                colours=colours,
            ) as writer,
        ):
            for polygon in trace_bands(numbered):
                place = polygon.label - 1
                numbers = {"Area px^2": polygon.area, "Equivalent diameter px": round(float(diameters[place]), 3)}
                writer.write(polygon, names[objects.class_index[place]], measurements=numbers)
        summary.files.append(path)

    def _write_table(self, objects: Objects) -> Path:
        """objects/<name>.csv, in pixels of the label map and, where the slide says what they measure, micrometres."""
        path = self.options.folder / "objects" / f"{self.frame.name}.csv"
        mpp = None if self.frame.mpp is None else sum(self.frame.mpp) / 2
        columns, rows = object_table(objects, self.config.class_names, mpp)
        with self._placed(path) as waiting, atomic_write(waiting, "w") as file:
            for text in csv_lines(columns, rows, self.options.decimal):
                file.write(text)
        return path

    # ------------------------------------------------------------------------------------------------------------------

    def _write(self, store: Job | MemoryStore, layer: str, folder: str) -> Path:
        """Write a layer under its folder; label maps past 65535 objects need TIFF."""
        stem = self.options.folder / folder / self.frame.name
        if isinstance(store, MemoryStore):
            values = store.arrays[layer]
            if layer == "labels":
                values = values.astype(np.uint16) if values.max(initial=0) < 65536 else values
                path = stem.with_name(f"{stem.name}{'.png' if values.dtype == np.uint16 else '.tif'}")
                write_mask(path, values)
            else:
                path = stem.with_name(f"{stem.name}{'.png' if values.ndim == 2 else '.tif'}")
                write_image(path, values)
            return path
        kind = layer_form(store.layers[layer], self.form)
        path = stem.with_name(f"{stem.name}{'.ome.tif' if kind == 'ome' else '.tif'}")
        tags = self.frame.geo.scaled(self.frame.scale) if self.frame.geo else ()
        names = self.config.class_names[-self.config.num_logits :] if layer == "prob" else None
        store.finish(layer, path, kind=kind, mpp=self.frame.mpp, extratags=tags, band_names=names)
        return path

    def _overlay(self, store: Job | MemoryStore, picture_of: Callable[[int], np.ndarray], side: int) -> np.ndarray:
        """The mask over the image, no longer than `side` pixels: (h, w, 3) uint8."""
        step = -(-max(self.frame.height, self.frame.width) // side)
        rows = []
        for top, classes in self._indices(store):
            rows.append(classes[-top % step :: step, ::step])
        return overlay(picture_of(step), np.concatenate(rows), class_colours(self.config.class_names))


class RunLengthFile:
    """Rows `id,predicted` of one picture, one for each class that is not the background."""

    def __init__(self, height: int, width: int, ids: dict[int, str]) -> None:
        self.ids = ids
        self.encoders = {k: RleEncoder(height, width) for k in ids}

    def append(self, classes: np.ndarray) -> None:
        """The next rows, class indices (h, W)."""
        for k, encoder in self.encoders.items():
            encoder.append(classes == k)

    def write(self, path: Path) -> None:
        """Write the file; no rows are taken any more."""
        with atomic_write(path, "w") as file:
            file.write("id,predicted\n")
            for k, encoder in self.encoders.items():
                file.write(csv_word(self.ids[k]) + ",")
                file.writelines(encoder.finish())
                file.write("\n")


def csv_word(text: str) -> str:
    """A cell of a csv file with commas between cells."""
    return '"' + text.replace('"', '""') + '"' if set(text) & set(',"\n') else text


def csv_lines(columns: Sequence[str], rows: Iterable[dict[str, Any]], decimal: str) -> Iterator[str]:
    """The text of a table in pieces of some thousand rows, see tables.format_csv."""
    yield format_csv(columns, [], decimal)
    left = iter(rows)
    while part := list(islice(left, 4096)):
        yield format_csv(columns, part, decimal).split("\n", 1)[1]


# ----------------------------------------------------------------------------------------------------------------------
# Layers and formats


def working_folder(folder: Path, name: str) -> Path:
    """The hidden folder beside the results in which those of one picture are made."""
    return folder / f".{name}.partial"


def choose_form(frame: Frame, options: ResultOptions) -> str:
    """The format of rasters: what was asked for, or PNG for what fits one and has no map coordinates, else a pyramid.

    Raises:
        ValueError: PNG was asked for a result that is too large to be held in memory.
    """
    small = frame.height * frame.width <= PNG_PIXELS
    if options.form == "auto":
        return "png" if small and frame.geo is None else "ome"
    if options.form == "png" and not small:
        raise ValueError(
            f"{frame.name}: a result of {frame.height} x {frame.width} pixels is held in memory to become a PNG; "
            f"expected at most {PNG_PIXELS / 1e6:.0f} megapixels: use --format ome, or read it smaller (--reduce)"
        )
    return options.form


def layer_form(layer: Layer, form: str) -> str:
    """The format of one layer: flat pages hold 8 bits of one band, other layers become OME-TIFF beside them."""
    return "ome" if form == "flat" and (layer.kind != np.uint8 or layer.bands > 1) else form


def check_geo(frame: Frame, options: ResultOptions) -> None:
    """Refuse polygons on a map before the network runs, not after.

    Raises:
        ImageError: the picture has no map coordinates, or only control points.
    """
    if options.geo and "geojson" in options.kinds and (frame.geo is None or frame.geo.affine() is None):
        found = "has no map coordinates (GeoTIFF tags)" if frame.geo is None else "has control points but no grid"
        raise ImageError(f"{frame.name} {found}; expected a georeferenced image: leave --geo out")


def first_layers(frame: Frame, config: ModelConfig, options: ResultOptions) -> list[Layer]:
    """What is spooled while the network runs: the mask, and probabilities if they are saved."""
    form = choose_form(frame, options)
    final = "mask" in options.kinds and options.filters == Filters()
    layers = [_layer(frame, form, "mask", label_values(np.zeros((1, 1), np.uint8), config).dtype, final=final)]
    if "prob" in options.kinds:
        kind = np.uint8 if form == "flat" and config.num_logits == 1 else np.uint16
        layers.append(_layer(frame, form, "prob", kind, shrink="mean", bands=config.num_logits))
    return layers


def second_layers(frame: Frame, config: ModelConfig, options: ResultOptions) -> list[Layer]:
    """What is spooled when whole objects are known: the filtered mask and the label map."""
    form = choose_form(frame, options)
    layers = []
    if options.filters != Filters():
        layers.append(_layer(frame, form, "mask", label_values(np.zeros((1, 1), np.uint8), config).dtype))
    if "labels" in options.kinds:
        layers.append(_layer(frame, form, "labels", np.dtype(np.uint32)))
    return layers


def _layer(
    frame: Frame, form: str, name: str, kind: Any, *, shrink: str = "nearest", bands: int = 1, final: bool = True
) -> Layer:
    return Layer(name, frame.height, frame.width, bands, kind, shrink, pyramid=final and form in ("ome", "flat"))


def disk_needed(frame: Frame, config: ModelConfig, options: ResultOptions) -> tuple[int, int]:
    """Bytes on disk that the results of a picture take while they are made: (expected, at most)."""
    layers = first_layers(frame, config, options) + second_layers(frame, config, options)
    if choose_form(frame, options) == "png":
        raw = sum(layer.height * layer.width * layer.bands * layer.kind.itemsize for layer in layers)
        return raw // 4, raw
    needs = [required_disk([layer]) for layer in layers]
    return sum(need.expected for need in needs), sum(need.worst for need in needs)


def check_disk(frame: Frame, config: ModelConfig, options: ResultOptions) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        OSError: ENOSPC with what is needed and what is there.
    """
    folder = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    needed, free = disk_needed(frame, config, options)[0], shutil.disk_usage(folder).free
    needed -= sum(path.stat().st_size for path in working_folder(folder, frame.name).glob("*/*"))
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"about {needed / 1e6:,.1f} MB are needed for {frame.name}, {free / 1e6:,.1f} MB are free; make room, "
            "save less (--save), or give a folder on another disk (-o)",
            str(folder),
        )


def existing_parent(path: Path) -> Path:
    """The folder itself or the nearest one above it that exists."""
    return next(folder for folder in (path.resolve(), *path.resolve().parents) if folder.is_dir())


def look_up(table: np.ndarray, values: np.ndarray) -> np.ndarray:
    """table[values]; many times faster where both are 8 bit."""
    if table.dtype == np.uint8 and values.dtype == np.uint8:
        whole = np.zeros(256, np.uint8)
        whole[: len(table)] = table
        return cv2.LUT(values, whole)
    return table[values]


def quantise(probs: np.ndarray, kind: np.dtype) -> np.ndarray:
    """Probabilities (K, h, W) as whole numbers of which the largest is 1: (h, W) for K = 1, else (h, W, K)."""
    top, scratch = np.float32(np.iinfo(kind).max), np.empty(probs.shape[1:], np.float32)
    result = np.empty(probs.shape, kind)
    for plane, values in zip(result, probs, strict=True):  # one class at a time: of many, each array is hundreds of MB
        np.clip(values, 0, 1, out=scratch)
        np.multiply(scratch, top, out=scratch)
        np.rint(scratch, out=scratch)
        plane[:] = scratch
    return result[0] if len(result) == 1 else result.transpose(1, 2, 0)
