"""Labels that people made elsewhere: masks, label maps, COCO and GeoJSON files, read as label maps of known images."""

import difflib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path, PureWindowsPath
from typing import Any, Literal

import numpy as np

from annotation.coco import Crop, decode_segmentation, paint_shapes
from geojson import check_inside, read_geojson
from image_headers import ImageError
from image_io import IMAGE_SUFFIXES, file_stem, list_images, read_mask

Kind = Literal["auto", "masks", "labels"]


@dataclass(eq=False)
class Labels:
    """What one file says about one image.

    Attributes:
        stem: of the image.
        source: the file.
        values: (H, W) of an unsigned type. A label map, one value for each object; or a mask.
        is_mask: the values tell objects from background, but not from each other.
        overlapping: objects of which others hide a part.
    """

    stem: str
    source: Path
    values: np.ndarray
    is_mask: bool = False
    overlapping: int = 0


@dataclass
class Reader:
    """Reads sources; what cannot be used is noted and the rest goes on.

    Attributes:
        sizes: (height, width) of every image that labels can be for, by stem.
        kind: of single-channel files: masks, label maps, or what their values say.
        only: classes of COCO and GeoJSON files that are taken; all when empty.
        findings: what was left out and why, filled while reading.
    """

    sizes: Mapping[str, tuple[int, int]]
    kind: Kind = "auto"
    only: frozenset[str] = frozenset()
    findings: list[str] = field(default_factory=list)

    def read(self, sources: Iterable[Path]) -> Iterator[Labels]:
        """The labels of all sources, image by image.

        Args:
            sources: files, or folders of files; of an output of annotate.py its labels/, else its gt/.
        """
        seen: dict[str, Path] = {}
        for path in self._list_files(sources):
            try:
                for labels in self._read_file(path):
                    if labels.stem in seen:
                        self._note(f"{path} is for {labels.stem!r}, as {seen[labels.stem]} was: left out")
                        continue
                    seen[labels.stem] = path
                    yield labels
            except (OSError, ValueError) as error:
                text = str(error)
                self._note(text if str(path) in text else f"{path}: {text}")

    def _note(self, text: str) -> None:
        self.findings.append(text)

    def _list_files(self, sources: Iterable[Path]) -> list[Path]:
        files: list[Path] = []
        for source in sources:
            if source.is_dir():
                folder = next((source / name for name in ("labels", "gt") if (source / name).is_dir()), source)
                listed = sorted(p for p in folder.iterdir() if p.suffix.lower() in (".geojson", ".json"))
                files += [*list_images(folder).values(), *(p for p in listed if not p.name.startswith("."))]
            elif source.exists():
                files.append(source)
            else:
                self._note(f"{source} does not exist; expected a file or a folder of labels")
        if not files and not self.findings:
            self._note("the sources hold no masks, label maps, .json or .geojson files")
        return files

    def _read_file(self, path: Path) -> Iterator[Labels]:
        suffix = path.suffix.lower()
        if suffix in IMAGE_SUFFIXES:
            yield from self._read_mask(path)
        elif suffix == ".json" and (document := _load_json(path)) is not None:
            yield from self._read_coco(path, document)
        elif suffix in (".geojson", ".json"):
            yield from self._read_geojson(path)
        else:
            expected = " ".join((*IMAGE_SUFFIXES, ".json", ".geojson"))
            self._note(f"{path} has the suffix {suffix!r}; expected labels in one of {expected}")

    def _known(self, stems: Sequence[str], path: Path, what: str = "") -> str | None:
        """The first of several stems that an image has."""
        for stem in stems:
            if stem in self.sizes:
                return stem
        near = difflib.get_close_matches(stems[0], self.sizes, 3)
        hint = f"; did it mean {' or '.join(map(repr, near))}?" if near else ""
        self._note(f"{path}{what} is for the image {stems[0]!r}, which images/ does not hold{hint}")
        return None

    def _read_mask(self, path: Path) -> Iterator[Labels]:
        stem = self._known([file_stem(path)], path)
        if stem is None:
            return
        values = read_mask(path)
        height, width = self.sizes[stem]
        if values.shape != (height, width):
            raise ImageError(
                f"{path} is {values.shape[1]} x {values.shape[0]} pixels, its image {width} x {height}; expected the "
                "same size: export it as large as the image"
            )
        some = values[values > 0]
        is_mask = self.kind == "masks" or (self.kind == "auto" and (not some.size or some.min() == some.max()))
        yield Labels(stem, path, values, is_mask)

    def _read_geojson(self, path: Path) -> Iterator[Labels]:
        name = path.name[: -len(path.suffix)]
        stem = self._known([file_stem(path), file_stem(Path(name)), name.split(" - ")[0]], path)
        if stem is None:
            return
        shapes, findings = read_geojson(path)
        size = self.sizes[stem]
        for finding in [*findings, *check_inside(shapes, *size)]:
            self._note(f"{path}: {finding}")
        chosen = [shape for shape in shapes if not self.only or shape.name in self.only]
        crops = []
        for feature, parts in groupby(chosen, key=lambda shape: shape.feature):
            crops.append((f"feature {feature}", paint_shapes(list(parts), *size)))
        yield self._paste(stem, path, crops)

    def _read_coco(self, path: Path, document: dict[str, list[dict[str, Any]]]) -> Iterator[Labels]:
        images = dict(self._coco_images(path, document["images"]))
        listed = {_key(entry, "id") for entry in document["images"]}
        names = {_key(entry, "id"): str(entry.get("name")) for entry in document.get("categories", [])}
        by_image: dict[str, list[dict[str, Any]]] = {number: [] for number in images}
        strays: Counter[str] = Counter()
        for annotation in document["annotations"]:
            if self.only and names.get(_key(annotation, "category_id")) not in self.only:
                continue
            number = _key(annotation, "image_id")
            if number in images:
                by_image[number].append(annotation)
            elif number not in listed:
                strays[number] += 1
        for number, count in strays.items():
            self._note(f"{path}: {count} annotations are of image {number}, which it does not list: left out")
        for number, stem in images.items():
            yield self._paste(stem, path, list(self._decode(path, by_image[number], self.sizes[stem])))

    def _coco_images(self, path: Path, entries: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str]]:
        """Key and stem of the images that are here and of the same size."""
        for entry in entries:
            name = PureWindowsPath(str(entry.get("file_name"))).name  # takes both kinds of slashes
            stem = self._known([file_stem(Path(name))], path, f": image {_key(entry, 'id')}")
            if stem is None:
                continue
            size, (height, width) = (entry.get("height"), entry.get("width")), self.sizes[stem]
            if size == (height, width):
                yield _key(entry, "id"), stem
            else:
                self._note(
                    f"{path}: image {name!r} is {size[1]} x {size[0]} pixels there, the file {width} x {height}; "
                    "expected the same size"
                )

    def _decode(
        self, path: Path, annotations: Sequence[dict[str, Any]], size: tuple[int, int]
    ) -> Iterator[tuple[str, Crop]]:
        for annotation in annotations:
            name = f"annotation {annotation.get('id')}"
            if annotation.get("iscrowd") and not isinstance(annotation.get("segmentation"), dict):
                self._note(f"{path}: {name} is a crowd without run lengths: left out")
                continue
            try:
                yield name, decode_segmentation(annotation.get("segmentation"), *size)
            except ImageError as error:
                self._note(f"{path}: {name} {error}: left out")

    def _paste(self, stem: str, path: Path, crops: Sequence[tuple[str, Crop]]) -> Labels:
        """One label map of objects that may overlap: the smaller keeps the pixels, so none is lost in a larger one."""
        values = np.zeros(self.sizes[stem], np.uint32)
        areas = [np.count_nonzero(crop) for _, (_, crop) in crops]
        for index in sorted(range(len(crops)), key=lambda k: -areas[k]):
            (left, top), crop = crops[index][1]
            values[top : top + crop.shape[0], left : left + crop.shape[1]][crop] = index + 1
        left_over = np.bincount(values.reshape(-1), minlength=len(crops) + 1)[1:].tolist()
        for (name, _), area, visible in zip(crops, areas, left_over, strict=True):
            if not area:
                self._note(f"{path}: {name} covers no pixel of the image: left out")
            elif not visible:
                self._note(f"{path}: {name} lies wholly under objects that are not larger: left out")
        hidden = sum(0 < visible < area for area, visible in zip(areas, left_over, strict=True))
        return Labels(stem, path, values, overlapping=hidden)


def _key(entry: dict[str, Any], name: str) -> str:
    """An id as text: files hold numbers, texts and worse."""
    return str(entry.get(name))


def _load_json(path: Path) -> dict[str, list[dict[str, Any]]] | None:
    """The content of a COCO file; None when it is none, and then may be GeoJSON.

    Raises:
        ImageError: its parts are no lists of objects.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(document, dict) or "images" not in document:
        return None
    for name in ("images", "annotations", "categories"):
        part = document.get(name, [] if name == "categories" else None)
        if not isinstance(part, list) or not all(isinstance(entry, dict) for entry in part):
            raise ImageError(f"{path} has {name} that are no list of objects; expected COCO's images and annotations")
    return document
