"""Rasters larger than memory -> tiled, compressed TIFF files, so that a run that was killed goes on where it was.

A job is a working folder: for each layer and pyramid level a spool of encoded tiles, and one journal. Rows come in from
top to bottom; each finished row of tiles goes to the spools, they are synced, and a line of the journal makes it count.
At the end the encoded tiles are handed to the TIFF writer as they are. Equal rows give byte-equal files, whatever their
portions and however often the work was interrupted.
"""

import contextlib
import hashlib
import os
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import tifffile

from spool import INDEX_ENTRY, FolderLock, JobError, Journal, naming, sync_folder
from tile_pyramid import Layer, Pyramid

__all__ = ["KINDS", "DiskNeed", "Job", "JobError", "Layer", "open_job", "required_disk"]

KINDS = ("tiff", "ome", "flat")
JOURNAL_FORMAT = 1
BIGTIFF_BYTES = 2**31  # classic TIFF ends at 4 GB, and some readers of it at 2
EXPECTED_SHARE = {"nearest": 0.05, "mean": 0.75}  # of the raw bytes, as measured on blobs and on smooth 16-bit fields
THREADS = 4


class DiskNeed(NamedTuple):
    """Bytes that a job takes at its peak, when the last file is written beside the spools."""

    expected: int
    worst: int


def required_disk(layers: Sequence[Layer]) -> DiskNeed:
    """Estimate the disk space of a job: spools and the final files, which are a copy of them.

    Returns:
        expected: for masks and labels of some objects, and for probabilities that are noisy everywhere.
        worst: for values that do not compress at all.
    """
    expected, worst = 0.0, 0
    for layer in layers:
        tile_bytes = layer.tile**2 * layer.samples * layer.kind.itemsize
        across = [-(-width // layer.tile) * layer.planes for _, width in layer.sizes()]
        tiles = sum(rows * columns for rows, columns in zip(layer.tile_rows(layer.height), across, strict=True))
        overhead = tiles * (INDEX_ENTRY.itemsize + 64)  # index, the TIFF's tables, deflate's frame
        raw = tiles * tile_bytes
        worst += 2 * (raw + raw // 4096 + overhead)
        expected += 2 * (raw * EXPECTED_SHARE[layer.shrink] + overhead)
    return DiskNeed(int(expected), worst)


def open_job(folder: Path, digest: str, layers: Sequence[Layer]) -> "Job":
    """Open a working folder; go on where an earlier run with the same digest and layers stopped, else start anew.

    Args:
        folder: made when absent. Files in it that are not the job's own are left alone.
        digest: stands for everything that decides about the pixels: image, weights, flags.
        layers: all of one height and one tile size; names differ.

    Raises:
        ValueError: the layers do not go together.
        JobError: another process works in the folder.
        OSError: the folder cannot be written.
    """
    layers = tuple(layers)
    if not layers or len({layer.name for layer in layers}) != len(layers):
        raise ValueError(f"layers are named {[layer.name for layer in layers]}, expected one or more different names")
    if len({(layer.height, layer.tile) for layer in layers}) > 1:
        found = ", ".join(f"{layer.name} {layer.height}/{layer.tile}" for layer in layers)
        raise ValueError(f"layers differ in height or tile size ({found}), expected one height and one tile size")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return Job(folder, digest, layers)


class Job:
    """Takes rows, keeps them safe, writes files. Made by open_job; close it, or use it in a with statement.

    Attributes:
        layers: by name.
        height: rows of level 0 that are expected in all.
        rows_done: rows of level 0 that are safe on the disk: a multiple of the tile size, or the height. The next rows
            to append after opening start here.
    """

    def __init__(self, folder: Path, digest: str, layers: Sequence[Layer]) -> None:
        self.folder = folder
        self.layers = {layer.name: layer for layer in layers}
        self.height, self.tile = layers[0].height, layers[0].tile
        self.rows_done = 0
        self._digest = digest
        self._lock = FolderLock(folder)
        self._pool = ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1))
        self._journal = Journal(folder / "journal")
        self._pyramids = {layer.name: Pyramid(folder, layer, self._pool) for layer in layers}
        self._taken = 0  # rows appended, finished or not
        self._failed = False
        try:
            self._restore()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- going on

    def _restore(self) -> None:
        header = {
            "format": JOURNAL_FORMAT,
            "digest": self._digest,
            "layers": [layer.describe() for layer in self.layers.values()],
        }
        lines = self._journal.load()
        if not lines or lines[0][1] != header:
            self._delete_files()
            lines = []
        end, rows, sizes = self._last_safe(lines)
        if lines:
            self._journal.cut(end)
        for pyramid, size in zip(self._pyramids.values(), sizes, strict=True):
            pyramid.resume(rows, size)
        if not lines:
            self._journal.append(header)
        sync_folder(self.folder)
        self.rows_done = self._taken = rows

    def _last_safe(self, lines: Sequence[tuple[int, Any]]) -> tuple[int, int, list[list[int]]]:
        """(end of the line, rows, sizes) of the last journal line whose files are all there."""
        for end, line in reversed(lines[1:]):
            together = zip(self._pyramids.values(), line["sizes"], strict=True)
            if all(pyramid.holds(line["rows"], sizes) for pyramid, sizes in together):
                return end, line["rows"], line["sizes"]
        nothing = [[0] * len(pyramid.sizes) for pyramid in self._pyramids.values()]
        return (lines[0][0] if lines else 0), 0, nothing

    def _delete_files(self) -> None:
        self._journal.path.unlink(missing_ok=True)  # first: spools without a journal are nothing
        for path in list(self.folder.iterdir()):
            if re.fullmatch(r"[\w-]+\.\d+\.(tiles|index)", path.name):
                path.unlink(missing_ok=True)

    # ---- writing

    def append(self, rows: Mapping[str, np.ndarray]) -> None:
        """Take the next rows of every layer.

        They are safe, and counted in rows_done, once their row of tiles is full or the height is reached.

        Args:
            rows: by layer name, (h, W) or (h, W, bands) of the layer's number type; any h, the same for all.

        Raises:
            ValueError: the rows do not fit the layers.
            OSError: disk full or other trouble with a file. What rows_done counts is kept; open the job again.
        """
        if self._failed:
            raise JobError(f"{self.folder}: an earlier write failed; open the job again to go on after the safe rows")
        checked = {name: self._check(name, rows) for name in self.layers}
        heights = {array.shape[0] for array in checked.values()}
        if len(heights) > 1 or set(rows) != set(checked):
            found = ", ".join(f"{name} {array.shape}" for name, array in rows.items())
            raise ValueError(f"rows are {found}; expected the same number of rows of {', '.join(self.layers)}")
        height = heights.pop()
        if self._taken + height > self.height:
            raise ValueError(f"{self._taken} + {height} rows were given, expected {self.height} in all")
        start = 0
        while start < height:
            stop = min(start + self.tile - self._taken % self.tile, height)
            self._add({name: array[start:stop] for name, array in checked.items()})
            start = stop

    def _check(self, name: str, rows: Mapping[str, np.ndarray]) -> np.ndarray:
        """The rows of a layer as (h, W, bands)."""
        layer = self.layers[name]
        array = rows.get(name)
        if array is not None and array.ndim == 2:
            array = array[..., None]
        if array is None or array.shape[1:] != (layer.width, layer.bands) or array.dtype != layer.kind:
            found = "missing" if array is None else f"{array.dtype} {array.shape}"
            raise ValueError(
                f"the rows of layer {name} are {found}, expected {layer.kind} (rows, {layer.width}, {layer.bands})"
            )
        return array

    def _add(self, rows: Mapping[str, np.ndarray]) -> None:
        """Add rows that fill the open tile row at most, and make it count when it is full."""
        self._failed = True
        for name, array in rows.items():
            self._pyramids[name].add(array)
        self._taken += array.shape[0]
        if self._taken % self.tile == 0 or self._taken == self.height:
            self._commit()
        self._failed = False

    def _commit(self) -> None:
        pyramids = self._pyramids.values()
        spools = [spool for pyramid in pyramids for spool in pyramid.spools]
        list(self._pool.map(lambda spool: spool.sync(), spools))  # at once: the disk takes them together
        sizes = [[spool.size for spool in pyramid.spools] for pyramid in pyramids]
        self._journal.append({"rows": self._taken, "sizes": sizes})
        self.rows_done = self._taken

    # ---- reading back and finishing

    def bands(self, name: str, level: int = 0) -> Iterator[tuple[int, np.ndarray]]:
        """Read a level back from the spool, also before all rows are there.

        Yields:
            (first row, rows (h, W), or (h, W, bands) for several bands), one row of tiles each.

        Raises:
            JobError: a tile is damaged; names it.
        """
        pyramid = self._pyramids[name]
        for row in range(self.layers[name].tile_rows(self.rows_done)[level]):
            rows = pyramid.read_rows(level, row)
            yield row * self.tile, rows[..., 0] if rows.shape[2] == 1 else rows

    def finish(
        self,
        name: str,
        path: Path,
        *,
        kind: str,
        mpp: tuple[float, float] | None = None,
        extratags: Sequence[tuple[Any, ...]] = (),
        band_names: Sequence[str] | None = None,
    ) -> None:
        """Write a layer as a file, which appears under its name only when it is complete.

        Args:
            name: the layer.
            path: target; replaced when it exists. Its folder is made.
            kind: "tiff" (level 0 alone, bands as planes of one page), "ome" (OME-TIFF, bands as channels, levels as
                SubIFDs: QuPath), "flat" (levels as pages behind one another: OpenSlide; uint8 of one band or RGB).
            mpp: microns per pixel (x, y) of level 0, for the resolution tags of every level.
            extratags: further tags of the main page as tifffile takes them, such as GeoTIFF's.
            band_names: names of the bands, kept by "ome".

        Raises:
            ValueError: unknown kind, a layer that "flat" cannot hold, or names that are not one for each band.
            JobError: rows are missing, or a tile is damaged; names it.
            OSError: the file could not be written; names it. The working folder stays.
        """
        layer, pyramid = self.layers[name], self._pyramids[name]
        check_kind(layer, kind)
        if band_names is not None and len(band_names) != layer.bands:
            raise ValueError(f"layer {name} has {layer.bands} bands, expected as many names, not {list(band_names)}")
        if self.rows_done < self.height:
            raise JobError(
                f"{self.folder} holds {self.rows_done} of {self.height} rows; expected all: append the others first"
            )
        levels = 1 if kind == "tiff" else len(pyramid.sizes)
        size = sum(spool.size + spool.count * INDEX_ENTRY.itemsize for spool in pyramid.spools[:levels])
        with replacing(Path(path)) as handle:
            big = size > BIGTIFF_BYTES
            with tifffile.TiffWriter(handle, bigtiff=big, byteorder="<", ome=kind == "ome", shaped=False) as tif:
                for level in range(levels):
                    page = _page_options(layer, pyramid.sizes[level], kind) | _resolution(mpp, level)
                    if level == 0:
                        page |= {"extratags": [(*tag[:4], True) for tag in extratags], "software": "Tessera"}
                    if kind == "ome" and level == 0:
                        page |= {"metadata": _ome_metadata(layer, mpp, band_names), "subifds": levels - 1}
                    elif level > 0:
                        page |= {"subfiletype": 1, "software": False}
                    tif.write(pyramid.iterate_encoded(level), **page)

    def remove(self) -> None:
        """Close the job and delete its files, and the folder when nothing else is in it."""
        self._close_files()
        self._delete_files()
        self._lock.release(remove=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def close(self) -> None:
        """Give the folder back; the files stay, so that the job can be opened again. Closing twice does no harm."""
        self._close_files()
        self._lock.release()

    def _close_files(self) -> None:
        self._failed = True  # nothing is taken any more
        self._pool.shutdown()
        for pyramid in self._pyramids.values():
            for spool in pyramid.spools:
                spool.close()


def check_kind(layer: Layer, kind: str) -> None:
    """Refuse a kind of file that is unknown or cannot hold the layer.

    Raises:
        ValueError: says which kinds can.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of file {kind!r}, expected one of {', '.join(KINDS)}")
    if kind == "flat" and (layer.kind != np.uint8 or (layer.bands > 1 and not layer.rgb)):
        raise ValueError(
            f"layer {layer.name} has {layer.bands} bands of {layer.kind}; a flat pyramid holds one band or RGB of "
            "uint8, as its readers do: write it as an OME-TIFF"
        )


def _page_options(layer: Layer, size: tuple[int, int], kind: str) -> dict[str, Any]:
    """What tifffile must know about tiles that are encoded already."""
    options: dict[str, Any] = {
        "dtype": layer.kind,
        "tile": (layer.tile, layer.tile),
        "compression": "zlib",
        "predictor": 2 if layer.predictor else None,
        "photometric": "rgb" if layer.rgb else "minisblack",
        "metadata": None,
    }
    if layer.rgb:
        return options | {"shape": (*size, layer.bands), "planarconfig": "contig"}
    if layer.bands == 1:
        return options | {"shape": size}
    if kind == "ome":  # a page for each channel
        return options | {"shape": (layer.bands, *size)}
    return options | {"shape": (layer.bands, *size), "planarconfig": "separate"}


def _resolution(mpp: tuple[float, float] | None, level: int) -> dict[str, Any]:
    if mpp is None:
        return {}
    return {"resolution": tuple(1e4 / (size * 2**level) for size in mpp), "resolutionunit": "CENTIMETER"}


def _ome_metadata(layer: Layer, mpp: tuple[float, float] | None, band_names: Sequence[str] | None) -> dict[str, Any]:
    """OME's description, without anything that differs from run to run."""
    description = repr(sorted(layer.describe().items()))
    metadata: dict[str, Any] = {
        "axes": "YXS" if layer.rgb else "CYX" if layer.bands > 1 else "YX",
        "Name": layer.name,
        "Creator": "Tessera",
        "UUID": str(uuid.uuid5(uuid.NAMESPACE_OID, description)),
    }
    if mpp is not None:
        unit = "\N{MICRO SIGN}m"
        metadata |= {
            "PhysicalSizeX": mpp[0],
            "PhysicalSizeXUnit": unit,
            "PhysicalSizeY": mpp[1],
            "PhysicalSizeYUnit": unit,
        }
    if band_names is not None and not layer.rgb:
        metadata["Channel"] = {"Name": list(band_names)}
    return metadata


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a hidden file beside the target that takes its place when the block ends well.

    Unlike image_io.atomic_write the hidden name follows from the target's: what a killed run left, gigabytes perhaps,
    is overwritten by the next one and does not pile up.

    Raises:
        OSError: the file could not be written; names the target.
    """
    target = path.resolve() if path.is_symlink() else path
    temporary = target.with_name(f".{hashlib.sha256(target.name.encode()).hexdigest()[:24]}.part")
    with naming(path, "the finished file", temporary):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as handle:
                yield handle
                handle.flush()
                os.fsync(handle.fileno())
            temporary.replace(target)
            sync_folder(target.parent)  # before the caller deletes the spools
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
