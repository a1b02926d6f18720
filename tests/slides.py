"""Small slides of coloured discs on white glass, with masks in every form; tests of slides share them."""

import json
from pathlib import Path

import numpy as np
import tifffile

from polygons import trace_labels
from rle import encode_rle

TISSUE, DISC = (220, 150, 190), (120, 40, 120)  # RGB of stained tissue and of what is looked for in it


def draw_slide(seed: int, size=(640, 900), discs=9, radius=(18, 40), classes=1):
    """A slide (H, W, 3) uint8 of a band of tissue with discs in it, and its class indices (H, W) uint8."""
    rng = np.random.default_rng(seed)
    height, width = size
    rows, columns = np.ogrid[:height, :width]
    image = np.full((*size, 3), 245, np.uint8)
    inside = (rows > height // 8) & (rows < height * 5 // 8) & (columns > width // 9) & (columns < width * 8 // 9)
    image[inside] = TISSUE
    mask = np.zeros(size, np.uint8)
    for number in range(discs):
        row, column = rng.uniform(0.25, 0.5) * height, rng.uniform(0.2, 0.8) * width
        label = number % classes + 1
        disc = (rows - row) ** 2 + (columns - column) ** 2 < rng.uniform(*radius) ** 2
        image[disc] = np.roll(DISC, label - 1)
        mask[disc] = label
    noise = rng.integers(-9, 10, (*size, 1), np.int16)
    return np.clip(image + noise, 0, 255).astype(np.uint8), mask


def write_slide(path: Path, image: np.ndarray, *, mpp: float | None = 0.5, levels: int = 2, tile=(128, 128)) -> Path:
    """Write a tiled pyramid."""
    path.parent.mkdir(parents=True, exist_ok=True)
    how = {"tile": tile, "compression": "deflate", "photometric": "rgb" if image.ndim == 3 else "minisblack"}
    if mpp is not None:
        how |= {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
    with tifffile.TiffWriter(path) as writer:
        writer.write(image, subifds=levels - 1, **how)
        for level in range(1, levels):
            writer.write(image[:: 2**level, :: 2**level], subfiletype=1, **how)
    return path


def write_geojson(path: Path, mask: np.ndarray, names=("disc",), origin=(0, 0)) -> Path:
    """Outline every class of a mask along the edges of its pixels."""
    features = []
    for label, name in enumerate(names, 1):
        for polygon in trace_labels(components(mask == label)):
            rings = [(ring + (origin[1], origin[0])).tolist() for ring in polygon.rings]
            properties = {"objectType": "annotation"} | ({"classification": {"name": name}} if name else {})
            features.append(
                {
                    "type": "Feature",
                    "geometry": {"type": "Polygon", "coordinates": rings},
                    "properties": properties,
                }
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}), encoding="utf-8")
    return path


def components(inside: np.ndarray) -> np.ndarray:
    """4-connected regions, numbered."""
    import cv2

    return cv2.connectedComponents(inside.astype(np.uint8), connectivity=4)[1].astype(np.uint32)


def write_runs(path: Path, masks: dict[str, np.ndarray], column="encoding") -> Path:
    """One csv table of the masks by name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [f"{name},{encode_rle(mask)}" for name, mask in masks.items()]
    path.write_text("\n".join([f"id,{column}", *rows]) + "\n", encoding="utf-8")
    return path


def write_mask_tiff(path: Path, mask: np.ndarray) -> Path:
    """A tiled mask of one level."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, mask, tile=(128, 128), compression="deflate")
    return path


def write_slides(root: Path, form="geojson", train=2, val=1, **how) -> Path:
    """<root>/train and <root>/val with masks as "geojson", "rle" or "tiff"."""
    for split, count, first in (("train", train, 0), ("val", val, 100)):
        drawn = {f"{split}{i}": draw_slide(first + i, **how) for i in range(count)}
        for name, (image, mask) in drawn.items():
            write_slide(root / split / "images" / f"{name}.svs", image)
            if form == "geojson":
                write_geojson(root / split / "gt" / f"{name}.geojson", mask)
            elif form == "tiff":
                write_mask_tiff(root / split / "gt" / f"{name}.tif", mask * 255)
        if form == "rle":
            write_runs(root / split / "gt" / "runs.csv", {name: mask for name, (_, mask) in drawn.items()})
    return root
