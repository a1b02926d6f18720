"""Tables about all annotated images: objects, COCO annotations, the report, and what to review first."""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import IO, Any

import numpy as np

from annotation.doubts import EDITED, FLAGS, rank_doubts
from annotation.instances import ROW_COLUMNS
from annotation.records import FileOptions, brief, read_record
from image_io import atomic_write, write_text
from tables import format_csv

LENGTHS = ("equivalent_diameter", "ellipse_major", "ellipse_minor")  # that are told in millimetres too
MM_COLUMNS = ("area_mm2", *(f"{name}_mm" for name in LENGTHS))
REVIEW_COLUMNS = (
    "rank",
    "image",
    "doubt",
    "look_at",
    "objects",
    "coverage",
    "touching",
    "mean_score",
    "lowest_score",
    "agreement",
    "median_diameter",
    "preset",
    "object_size",
    "edited",
    "labels",
    "overlay",
)
REPORT_VALUES = (
    "image",
    "objects",
    "coverage",
    "largest",
    "touching",
    "mean_score",
    "lowest_score",
    "agreement",
    "median_diameter",
    "preset",
    "object_size",
    "engines",
    "seconds",
)


def write_tables(
    options: FileOptions, records: Iterable[Mapping[str, Any]], about: Mapping[str, Any] | None = None
) -> None:
    """Write objects.csv, annotations.json, report.json and review.csv, each whole or not at all.

    Args:
        options: what and where.
        records: of all images, as write_image_files gives them; their objects are read image by image.
        about: more for report.json, such as settings and versions.
    """
    briefs = sorted((brief(record) for record in records), key=lambda record: record["stem"])
    ranked = rank_doubts(briefs)
    write_report(options, ranked, about or {})
    write_review(options, ranked)
    write_objects(options, briefs)


def write_objects(options: FileOptions, records: Sequence[Mapping[str, Any]]) -> None:
    """Write objects.csv and annotations.json, in memory for one image."""
    columns = ["image", *ROW_COLUMNS, *(MM_COLUMNS if options.mm_per_pixel else ())]
    with ExitStack() as stack:
        table = stack.enter_context(atomic_write(options.folder / "objects.csv", "w"))
        coco = stack.enter_context(atomic_write(options.folder / "annotations.json", "w"))
        table.write(format_csv(columns, [], options.decimal))
        coco.write(_coco_head(records))
        number = 0
        for place, record in enumerate(records, start=1):
            full = read_record(options, record["stem"])
            if full is None:  # removed meanwhile
                continue
            objects = full["table"] | {"image": [record["image"]] * record["objects"]}
            if options.mm_per_pixel:
                objects |= _millimetres(objects, options.mm_per_pixel)
            rows = zip(*(objects[name] for name in columns), strict=True)
            text = format_csv(columns, [dict(zip(columns, row, strict=True)) for row in rows], options.decimal)
            table.write(text.split("\n", 1)[1])
            _write_annotations(coco, objects, full, place, number)
            number += record["objects"]
        coco.write("\n]}\n")


def _millimetres(objects: Mapping[str, list[Any]], mm_per_pixel: float) -> dict[str, list[float]]:
    columns = {f"{name}_mm": [mm_per_pixel * value for value in objects[name]] for name in LENGTHS}
    return columns | {"area_mm2": [mm_per_pixel**2 * value for value in objects["area"]]}


def _coco_head(records: Sequence[Mapping[str, Any]]) -> str:
    """Everything before the annotations; file names are those in images/."""
    images = [
        {"id": place, "file_name": record["image"], "width": record["size"][1], "height": record["size"][0]}
        for place, record in enumerate(records, start=1)
    ]
    head = {
        "info": {"description": "weak labels made by annotate.py of Tessera"},
        "licenses": [],
        "categories": [{"id": 1, "name": "object", "supercategory": ""}],
        "images": images,
    }
    return json.dumps(head, ensure_ascii=False)[:-1] + ', "annotations": ['


def _write_annotations(
    file: IO[str], objects: Mapping[str, list[Any]], record: Mapping[str, Any], image_id: int, number: int
) -> None:
    """The annotations of one image; number says how many came before."""
    holes, outlines = objects.get("holes"), objects.get("outline")
    polygons = record["made"]["coco"] == "polygons"
    for k, counts in enumerate(objects["counts"]):
        plain = polygons and outlines and holes and not holes[k]
        annotation = {
            "id": number + k + 1,
            "image_id": image_id,
            "category_id": 1,
            "segmentation": [outlines[k]] if plain and outlines else {"size": record["size"], "counts": counts},
            "area": objects["area"][k],
            "bbox": [objects[f"box_{side}"][k] for side in ("left", "top", "width", "height")],
            "iscrowd": 0,
            "score": objects["score"][k],
            "engine": objects["engine"][k],
        }
        file.write(f"{',' if number + k else ''}\n{json.dumps(annotation, ensure_ascii=False)}")


def write_report(options: FileOptions, ranked: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> None:
    """Write report.json: sums over all images, then a line for each, the most doubtful first."""
    report = _sums(ranked) | dict(about)
    report.pop("per_image")
    lines = []
    for entry in ranked:
        values = {name: entry["record"].get(name) for name in REPORT_VALUES}
        lines.append(json.dumps({**values, "doubt": entry["doubt"], "flags": entry["flags"]}, ensure_ascii=False))
    text = json.dumps(report, indent=2, ensure_ascii=False)[:-2]
    body = "".join(f"{',' if k else ''}\n    {line}" for k, line in enumerate(lines))
    write_text(options.folder / "report.json", f'{text},\n  "per_image": [{body}\n  ]\n}}\n')


def _sums(ranked: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What report.json says about all images together."""
    records = [entry["record"] for entry in ranked]
    flags = [flag for entry in ranked for flag in entry["flags"]]
    return {
        "images": len(records),
        "objects": sum(record["objects"] for record in records),
        "edited": flags.count(EDITED),
        "flags": {flag: flags.count(flag) for flag in FLAGS},
        "objects_per_image": _spread([record["objects"] for record in records]),
        "coverage": _spread([record["coverage"] for record in records]),
        "median_diameter": _spread([record["median_diameter"] for record in records]),
        "mean_score": _spread([record["mean_score"] for record in records]),
        "agreement": _spread([record["agreement"] for record in records]),
        "engine_seconds": round(sum(record["seconds"] for record in records), 3),
        "per_image": [],
    }


def read_about(options: FileOptions) -> dict[str, Any]:
    """What a report holds beside the sums, as it was given to write_tables; nothing when there is no report."""
    try:
        report = json.loads((options.folder / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {name: value for name, value in report.items() if name not in _sums([])} if isinstance(report, dict) else {}


def _spread(values: Sequence[float | None]) -> dict[str, float] | None:
    """Least, median, mean and largest of the numbers that are known."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    spread = {"min": min(known), "median": float(np.median(known)), "mean": float(np.mean(known)), "max": max(known)}
    return {name: round(float(value), 4) for name, value in spread.items()}


def write_review(options: FileOptions, ranked: Sequence[Mapping[str, Any]]) -> None:
    """Write review.csv: the images in the order in which a person should look at them."""
    rows = []
    for place, entry in enumerate(ranked, start=1):
        record = entry["record"]
        values = {name: record.get(name) for name in REVIEW_COLUMNS}
        rows.append(
            values
            | {
                "rank": place,
                "doubt": entry["doubt"],
                "look_at": ", ".join(entry["flags"]),
                "edited": " ".join(kind for kind, digest in record["edited"].items() if digest),
                "labels": f"labels/{record['label_file']}",
                "overlay": f"overlays/{record['stem']}.png" if options.overlays else None,
            }
        )
    write_text(options.folder / "review.csv", format_csv(REVIEW_COLUMNS, rows, options.decimal))
