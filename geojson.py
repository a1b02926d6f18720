"""GeoJSON in and out: outlines of regions that QuPath and GIS programs open, annotations that they wrote."""

import contextlib
import json
import math
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np

from image_headers import ImageError
from image_io import atomic_write
from polygons import Polygon, Shape

_FLUSH = 1 << 20  # characters gathered before they are written
_DECIMALS = 3  # of a pixel: what a coordinate may lose
_DEPTH = 32  # of geometry collections inside each other

Affine = tuple[float, float, float, float, float, float]


class GeoJsonError(ImageError):
    """A GeoJSON file that cannot be used at all; the message names the path, what was found and what was expected."""


@dataclass(frozen=True)
class Finding:
    """A part of a GeoJSON file that gives no shape, or a shape that lies outside the image."""

    feature: int  # its number in the file, from 1
    kind: str  # "no geometry", "no area", "bad ring" or "outside"
    problem: str

    def __str__(self) -> str:
        """One line for a report."""
        return f"feature {self.feature}: {self.problem}"


class GeoJsonWriter:
    """Writes a FeatureCollection as polygons come; the file appears under its name when the block ends well.

        with GeoJsonWriter(path, scale=grid.scale, colours={"vessel": (200, 0, 0)}) as writer:
            for polygon in trace_bands(...):
                writer.write(polygon, "vessel", measurements={"Area px": polygon.area})

    Each feature has what QuPath reads: an id, objectType, name, classification and measurements. Exteriors run
    counter-clockwise and holes clockwise in the numbers written (RFC 7946).

    Args:
        path: .geojson or .json file.
        scale: level-0 pixels for each pixel of the polygons. Whole numbers are written as such, others with at most
            three decimals.
        affine: (a, b, c, d, e, f) to write map coordinates a x + b y + c, d x + e y + f instead of level-0 pixels
            (x, y), with the decimals that keep a thousandth of a pixel.
        epsg: code of the map's coordinate system, written as the member "crs". RFC 7946 knows it no more; GIS
            programs read it and would take plain coordinates for degrees.
        colours: class name to (red, green, blue), 0..255; a class without one gets QuPath's own colour.
        object_type: "annotation" or "detection" (QuPath handles tens of thousands of these).

    Raises:
        OSError: the file could not be written.
    """

    def __init__(
        self,
        path: Path,
        *,
        scale: float = 1.0,
        affine: Affine | None = None,
        epsg: int | None = None,
        colours: Mapping[str, Sequence[int]] | None = None,
        object_type: str = "annotation",
    ) -> None:
        self.count = 0
        self._path = Path(path)
        self._epsg = epsg
        self._transform = _Transform(scale, affine)
        self._colours = dict(colours or {})
        self._object_type = json.dumps(object_type)
        self._classifications: dict[str, str] = {}
        self._stack = contextlib.ExitStack()
        self._handle: IO[bytes]
        self._parts: list[str] = []
        self._size = 0

    def __enter__(self) -> Self:
        """Open the hidden file."""
        self._handle = self._stack.enter_context(atomic_write(self._path))
        self._stack.push(self._finish)
        crs = ""
        if self._epsg is not None:
            name = {"type": "name", "properties": {"name": f"urn:ogc:def:crs:EPSG::{self._epsg}"}}
            crs = f'"crs":{_dump(name)},'
        self._put(f'{{"type":"FeatureCollection",{crs}"features":[')
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        """Close the collection and rename the file, or remove it after an error."""
        return self._stack.__exit__(kind, error, trace)

    def write(
        self,
        polygon: Polygon,
        class_name: str,
        *,
        name: str | None = None,
        measurements: Mapping[str, float] | None = None,
    ) -> None:
        """Add one feature.

        Args:
            polygon: from trace_bands. Its label and the name of the file make the id, so that repeated runs agree.
            class_name: shown and coloured as the classification.
            name: shown in QuPath's list of objects; "<class name> <label>" by default.
            measurements: name to number; those that are not finite are left out, JSON cannot hold them.
        """
        if class_name not in self._classifications:
            classification: dict[str, Any] = {"name": class_name}
            if class_name in self._colours:
                classification["color"] = [int(value) for value in self._colours[class_name]]
            self._classifications[class_name] = _dump(classification)
        numbers = {key: _plain(value) for key, value in (measurements or {}).items() if math.isfinite(value)}
        identity = uuid.uuid5(uuid.NAMESPACE_URL, f"{self._path.stem}/{polygon.label}")
        rings = ",".join(map(self._transform.format_ring, polygon.rings))
        self._put(
            f'{"," if self.count else ""}\n{{"type":"Feature","id":"{identity}",'
            f'"geometry":{{"type":"Polygon","coordinates":[{rings}]}},'
            f'"properties":{{"objectType":{self._object_type},'
            f'"name":{_dump(f"{class_name} {polygon.label}" if name is None else name)},'
            f'"classification":{self._classifications[class_name]},"measurements":{_dump(numbers)}}}}}'
        )
        self.count += 1

    def _put(self, text: str) -> None:
        self._parts.append(text)
        self._size += len(text)
        if self._size >= _FLUSH:
            self._flush()

    def _flush(self) -> None:
        self._handle.write("".join(self._parts).encode())
        self._parts.clear()
        self._size = 0

    def _finish(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._put("\n]}\n")
            self._flush()


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _plain(value: Any) -> int | float:
    """A number of Python from one of numpy."""
    return int(value) if isinstance(value, int | np.integer) else float(value)


class _Transform:
    """Corners of the grid -> coordinates as text."""

    def __init__(self, scale: float, affine: Affine | None) -> None:
        a, b, c, d, e, f = affine or (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
        determinant = a * e - b * d
        if not (math.isfinite(determinant) and determinant and math.isfinite(c + f) and scale > 0):
            raise ValueError(
                f"scale {scale:g} and affine {affine} map pixels to no area; expected a positive scale and an affine "
                "whose a e - b d is not 0: read both from the slide"
            )
        self._matrix = np.array([[a, d], [b, e]]) * scale
        self._shift = np.array([c, f])
        self._step = -1 if determinant < 0 else 1  # a mirrored map turns the rings round
        pixel = 1.0 if affine is None else math.sqrt(abs(determinant))
        self._decimals = max(_DECIMALS, math.ceil(_DECIMALS - math.log10(pixel)))
        # Without rotation few numbers are written many times: the text of each column and each row.
        self._texts: tuple[list[str], list[str]] | None = ([], []) if b == d == 0 else None

    def format_ring(self, ring: np.ndarray) -> str:
        """A ring (n, 2) as JSON, [[x,y],...]."""
        ring = ring[:: self._step]
        if self._texts is None:
            points = ring @ self._matrix + self._shift
            x, y = self._format(points[:, 0]), self._format(points[:, 1])
        else:
            x, y = (self._look_up(axis, ring[:, axis]) for axis in (0, 1))
        return "[[" + "],[".join(map(",".join, zip(x, y, strict=True))) + "]]"

    def _look_up(self, axis: int, numbers: np.ndarray) -> list[str]:
        assert self._texts is not None
        texts = self._texts[axis]
        missing = int(numbers.max()) + 1 - len(texts)
        if missing > 0:
            more = np.arange(len(texts), len(texts) + max(missing, 4096))
            texts += self._format(more * self._matrix[axis, axis] + self._shift[axis])
        return list(map(texts.__getitem__, numbers.tolist()))

    def _format(self, values: np.ndarray) -> list[str]:
        rounded = np.round(values, self._decimals) + 0.0  # no -0
        return [str(value).removesuffix(".0") for value in rounded.tolist()]


def read_geojson(path: Path) -> tuple[list[Shape], list[Finding]]:
    """Read the polygons of a FeatureCollection, a list of features, one feature or a bare geometry.

    A MultiPolygon or a GeometryCollection gives several shapes with one feature number. The class of a shape is
    properties.classification (QuPath), or the property class, label or name, the first that is there. Further
    coordinates of a point (height) are dropped, open rings are closed. The file is UTF-8 with or without BOM, UTF-16
    with BOM, or else cp1251.

    Returns:
        The shapes in the order of the file, and what could not be made one.

    Raises:
        GeoJsonError: not JSON, cut short, or JSON of another kind.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    document = _parse(_decode(path.read_bytes(), path), path)
    shapes: list[Shape] = []
    findings: list[Finding] = []
    for number, feature in enumerate(_list_features(document, path), 1):
        if not isinstance(feature, dict):
            findings.append(Finding(number, "no geometry", f"is {_show(feature)}, expected a Feature"))
            continue
        is_feature = feature.get("type") == "Feature" or "geometry" in feature
        geometry = feature.get("geometry") if is_feature else feature
        name = _class_name(feature.get("properties")) if is_feature else None
        for part in _list_polygons(geometry):
            rings = _read_rings(part) if isinstance(part, list) else part
            if isinstance(rings, tuple):
                shapes.append(Shape(name, rings, number))
            else:
                findings.append(Finding(number, *rings.split(": ", 1)))
    return shapes, findings


def check_inside(shapes: Sequence[Shape], height: int, width: int, tolerance: float = 1.0) -> list[Finding]:
    """Find the shapes that reach over the edge of an image.

    Args:
        shapes: in pixels of the image.
        height: of the image, pixels.
        width: of the image, pixels.
        tolerance: by how many pixels a ring may reach outside (the border of a reduced grid does, by less than its
            scale).
    """
    findings = []
    for shape in shapes:
        points = np.concatenate(shape.rings)
        (left, top), (right, bottom) = points.min(axis=0), points.max(axis=0)
        if min(left, top) >= -tolerance and right <= width + tolerance and bottom <= height + tolerance:
            continue
        apart = right <= 0 or bottom <= 0 or left >= width or top >= height
        findings.append(
            Finding(
                shape.feature,
                "outside",
                f"lies {'wholly' if apart else 'partly'} outside the image: x {left:g} to {right:g}, y {top:g} to "
                f"{bottom:g}; expected x 0 to {width}, y 0 to {height}: is it of another image, level or in map units?",
            )
        )
    return findings


def _decode(data: bytes, path: Path) -> str:
    if len(data.strip()) < 4:  # or nothing but a byte-order mark
        raise GeoJsonError(f"{path} is empty ({len(data)} bytes); expected GeoJSON: export it again")
    codecs = ["utf-16"] if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ["utf-8-sig", "cp1251"]
    for codec in codecs:
        with contextlib.suppress(UnicodeDecodeError):
            return data.decode(codec)
    raise GeoJsonError(f"{path} is not text in {' or '.join(codecs)}; expected GeoJSON: save it as UTF-8")


def _parse(text: str, path: Path) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        text = text.strip()
        is_cut = text[:1] in ("[", "{") and text[-1] not in "]}"
        found = "ends too early" if is_cut else f"is not JSON at {error.doc[error.pos :].strip()[:20]!r}"
        raise GeoJsonError(
            f"{path} {found} (line {error.lineno}, column {error.colno}: {error.msg}); expected a complete GeoJSON "
            "file: copy or export it again"
        ) from error
    except (RecursionError, ValueError) as error:  # brackets without end; a number of thousands of digits
        raise GeoJsonError(
            f"{path} is no GeoJSON ({error}); expected features with polygons: export it again"
        ) from error


def _list_features(document: Any, path: Path) -> list[Any]:
    if isinstance(document, list):
        return document
    kind = document.get("type") if isinstance(document, dict) else None
    if kind == "FeatureCollection":
        if isinstance(document.get("features"), list):
            return document["features"]
        raise GeoJsonError(
            f"{path} is a FeatureCollection whose features are {_show(document.get('features'))}; expected a list: "
            "export it again"
        )
    if kind == "Feature" or (
        isinstance(document, dict) and not {"coordinates", "geometries", "geometry"}.isdisjoint(document)
    ):
        return [document]
    keys = f"an object with {_show(list(document)[:6])}" if isinstance(document, dict) else _show(document)
    raise GeoJsonError(
        f"{path} holds {keys}; expected GeoJSON: a FeatureCollection, a list of features, a feature, or a geometry "
        "with an area"
    )


def _list_polygons(geometry: Any, depth: int = 0) -> Iterator[Any]:
    """The coordinates of every polygon in a geometry; a finding, "kind: problem", for what is none."""
    if not isinstance(geometry, dict):
        yield f"no geometry: has the geometry {_show(geometry)}, expected a Polygon or a MultiPolygon"
        return
    kind, coordinates = geometry.get("type"), geometry.get("coordinates")
    members = geometry.get("geometries") if kind == "GeometryCollection" else coordinates
    if kind not in ("Polygon", "MultiPolygon", "GeometryCollection"):
        yield f"no area: is a {_show(kind)}, which covers no pixels; expected a Polygon or a MultiPolygon"
    elif not isinstance(members, list) or not members:
        yield f"no geometry: is a {kind} of {_show(members)}, expected a list of its parts"
    elif depth > _DEPTH:
        yield f"no geometry: has more than {_DEPTH} collections inside each other"
    elif kind == "Polygon":
        yield coordinates
    elif kind == "MultiPolygon":
        yield from (
            part if isinstance(part, list) and part else f"bad ring: has a polygon {_show(part)}, expected its rings"
            for part in members
        )
    else:
        for member in members:
            yield from _list_polygons(member, depth + 1)


def _read_rings(coordinates: list[Any]) -> tuple[np.ndarray, ...] | str:
    """The closed rings of one polygon, (n, 2) float64 each; or a finding."""
    rings = []
    for number, ring in enumerate(coordinates, 1):
        problem = "is no list of points"
        points = _read_points(ring)
        if points is not None:
            closed = len(points) > 1 and np.array_equal(points[0], points[-1])
            problem = _ring_problem(points[:-1] if closed else points)
        if points is None or problem:
            return f"bad ring: ring {number} {problem}; expected at least three points [x, y]: draw it again"
        rings.append(points if closed else np.concatenate([points, points[:1]]))
    return tuple(rings)


def _read_points(ring: Any) -> np.ndarray | None:
    """A list of [x, y, ...] as (n, 2) float64, None when it is anything else."""
    if not isinstance(ring, list):
        return None
    with contextlib.suppress(ValueError):  # points of unequal lengths
        points = np.array(ring)
        if points.ndim == 2 and points.shape[1] >= 2 and points.dtype.kind in "iuf":
            return points[:, :2].astype(np.float64)
    if not all(isinstance(point, list) and len(point) >= 2 for point in ring):
        return None
    pairs = [number for point in ring for number in point[:2]]
    if not all(type(number) in (int, float) for number in pairs):
        return None
    try:
        return np.array(pairs, np.float64).reshape(-1, 2)
    except OverflowError:  # an integer of hundreds of digits
        return np.full((len(ring), 2), np.nan)


def _ring_problem(points: np.ndarray) -> str:
    if len(points) < 3:
        return f"has {len(points)} points"
    if not np.isfinite(points).all():
        return "has coordinates that are not finite"
    return ""


def _class_name(properties: Any) -> str | None:
    """The class that a feature's properties name."""
    if not isinstance(properties, dict):
        return None
    classification = properties.get("classification")
    if isinstance(classification, dict):
        names = classification.get("names")
        classification = classification.get("name") or (": ".join(map(str, names)) if isinstance(names, list) else None)
    candidates = (classification, *(properties.get(key) for key in ("class", "label", "name")))
    for value in candidates:
        if isinstance(value, str | int | float) and not isinstance(value, bool) and str(value).strip():
            return str(value).strip()
    return None


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 40 else f"{text[:37]}..."
