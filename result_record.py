"""What a folder of results says about itself: which files are whose, what is done, what a killed run left.

Every picture has lines in predict.jsonl: one when it is begun and one when it is done. They tell the files of an
earlier run of the same command, which may be replaced, from those of other flags and of somebody else, which may not.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint import ModelConfig, config_to_dict
from slide_writer import replacing
from spool import naming

RASTERS = {"mask": "masks", "prob": "raw", "labels": "labels"}  # kind -> folder
TABLE = "table"  # kind of result that every video has, and no picture
FOLDERS = {**RASTERS, "overlay": "overlays", "geojson": "geojson", "rle": "rle"}
FOLDERS |= {"video": "videos", "gif": "gifs", TABLE: "over_time"}
OBJECT_KINDS = {"labels", "geojson"}  # they also write objects/
SUFFIXES = (".png", ".tif", ".ome.tif", ".geojson", ".csv", ".mp4", ".gif")
RECORD, DESCRIPTION = "predict.jsonl", "predict.json"  # what was done to each picture; what the classes are
LEFTOVER_SECONDS = 3600
RUN_LENGTHS = "rle.csv"  # of all pictures together

Record = dict[str, list[dict[str, Any]]]


def existing_files(folder: Path, name: str, places: Iterable[str], *, video: bool = False) -> list[Path]:
    """Result files of a picture, or of a video and its frames, that are in some of the folders of results."""
    found = []
    for place in sorted(places):
        if video and (folder / place).is_dir():
            inside = sorted((folder / place).iterdir())
            found += [path for path in inside if is_frame_of(name, path.name) and path.name.endswith(SUFFIXES)]
        for suffix in SUFFIXES:
            path = folder / place / f"{name}{suffix}"
            if path.exists():
                found.append(path)
    return found


def is_frame_of(video: str, name: str) -> bool:
    """Whether a file, or the stem of one, is named as a result of a video's frame."""
    return re.fullmatch(re.escape(video) + r"_\d{6,}(\.[a-z.]+)?", name) is not None


@dataclass
class Before:
    """What a folder of results holds already.

    done: names whose results are there, made with the same flags from the same files. missing: of pictures of which
    some kinds are there like that, those that are not. others: files in the way that are somebody else's, or of other
    flags.
    """

    done: set[str]
    missing: dict[str, list[str]]
    others: list[Path]


def find_done(
    folder: Path,
    digests: Mapping[str, str | None],
    kinds: Sequence[str],
    *,
    overwrite: bool,
    report: Callable[[str], None] = lambda _: None,
) -> set[str]:
    """Names of pictures whose results are there, made with the same flags from the same files.

    Args:
        digests: see look_before.
        report: takes one line for each picture of which some kinds are there and others are not.

    Raises:
        FileExistsError: results of other flags, or of something else, are in the way.
    """
    remove_leftovers(folder)
    before = look_before(folder, digests, kinds)
    if before.others and not overwrite:
        count = len(before.others)
        what = "1 result of other flags or files is" if count == 1 else f"{count} results of other flags or files are"
        raise FileExistsError(
            f"{what} in the way{', first' if count > 1 else ''}: {before.others[0]}; "
            "replace with --overwrite, or give another folder with -o"
        )
    for name, missing in before.missing.items():
        there = [kind for kind in kinds if kind not in missing]
        report(f"{name}: {', '.join(there)} there, {', '.join(missing)} missing: predicted again for all of them")
    return before.done


def look_before(folder: Path, digests: Mapping[str, str | None], kinds: Sequence[str]) -> Before:
    """Tell finished pictures, those that an earlier run of the same command began, and files of somebody else apart.

    Args:
        digests: name of each picture to what decides about its results, whatever their kinds; None when its file
            cannot be looked at.
    """
    record = read_record(folder / RECORD)
    before = Before(set(), {}, [])
    for name, digest in digests.items():
        rows = [row for row in record.get(name, []) if digest and row["digest"] == digest]
        ours = _folders([kind for row in rows for kind in row["kinds"]])
        before.others += existing_files(folder, name, _folders(kinds) - ours, video=TABLE in kinds)
        missing = [kind for kind in kinds if not any(_is_done(folder, row, kind) for row in rows)]
        if not missing:
            before.done.add(name)
        elif len(missing) < len(kinds):
            before.missing[name] = missing
    if not record:  # of a folder of results they are parts
        if "rle" in kinds and (folder / RUN_LENGTHS).exists():
            before.others.append(folder / RUN_LENGTHS)
        if (folder / DESCRIPTION).exists() and not is_description(folder / DESCRIPTION):
            before.others.append(folder / DESCRIPTION)
    return before


def _is_done(folder: Path, row: Mapping[str, Any], kind: str) -> bool:
    """Whether a row of the record says that results of a kind were made without damage, and they are still there."""
    if kind not in row["kinds"] or not row["done"] or row["damage"]:
        return False
    return all((folder / file).is_file() for file in row["files"] if Path(file).parts[0] in _folders([kind]))


def is_description(path: Path) -> bool:
    """Whether a file is predict.json of this toolkit, and not somebody else's of that name."""
    try:
        return "config" in json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def read_record(path: Path) -> Record:
    """Rows of predict.jsonl by name: of each kind of result the last one. A line cut short by a kill is left out."""
    rows: Record = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = {"digest": "", "kinds": [], "done": False, "files": [], "damage": []} | json.loads(line)
                earlier = rows.get(row["name"], [])
                rows[row["name"]] = [*(left for old in earlier if (left := _left_of(old, row))), row]
            except (ValueError, TypeError, KeyError):
                continue
    return rows


def _left_of(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any] | None:
    """What a row still tells after a later one: all of it, or of replaced results the scale of those that stayed."""
    if old["digest"] and old["digest"] == new["digest"]:  # made again they are the same, those in objects/ too
        kinds = [kind for kind in old["kinds"] if kind not in new["kinds"]]
        return {**old, "kinds": kinds} if kinds else None
    taken = _folders(new["kinds"])
    if not _folders(old["kinds"]) & taken:
        return old
    kinds = [kind for kind in old["kinds"] if not _folders([kind]) & taken]
    return {**old, "kinds": kinds, "digest": "", "done": False, "files": []} if kinds else None


def _folders(kinds: Sequence[str]) -> set[str]:
    """Where results of some kinds lie."""
    return {FOLDERS[kind] for kind in kinds} | ({"objects"} if OBJECT_KINDS & set(kinds) else set())


def add_to_record(path: Path, row: dict[str, Any], *, durable: bool = True) -> None:
    """Append one line, in a line of its own even when a kill cut the last one short.

    Args:
        durable: it is on the disk before the command goes on, so it outlives a loss of power, not only of the process.

    Raises:
        OSError: it cannot be written; names the file.
    """
    with naming(path, f"the line of {row['name']}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - 1, 0))
            start = b"" if file.read(1) in (b"", b"\n") else b"\n"
            file.write(start + json.dumps(row, ensure_ascii=False).encode() + b"\n")
            file.flush()
            if durable:
                os.fsync(file.fileno())


def begin_record(folder: Path, name: str, digest: str, kinds: Sequence[str], facts: Mapping[str, Any]) -> None:
    """Note that what appears under this name from now on is ours, so that a run that was killed can go on."""
    add_to_record(folder / RECORD, {"name": name, "digest": digest, "kinds": list(kinds), **facts}, durable=False)


def end_record(  # noqa: PLR0913 - they are the line of the record
    folder: Path,
    name: str,
    digest: str,
    kinds: Sequence[str],
    files: Sequence[Path],
    facts: Mapping[str, Any],
    *,
    durable: bool,
) -> None:
    """Note that a picture is done, and delete what these files replace in another format, as a.ome.tif does a.png.

    Args:
        files: its results.
        durable: see add_to_record; for what would take long to do again.
        facts: damage (what could not be decoded), scale and mpp of the results.
    """
    kept = set(files)
    for path in existing_files(folder, name, _folders(kinds), video=TABLE in kinds):
        if path not in kept:
            path.unlink(missing_ok=True)
    names = [path.relative_to(folder).as_posix() for path in files]
    row = {"name": name, "digest": digest, "kinds": list(kinds), "done": True, "files": names, **facts}
    add_to_record(folder / RECORD, row, durable=durable)


def remove_leftovers(folder: Path) -> None:
    """Delete what image_io.atomic_write could not finish; what is young may be another command's that still works."""
    for path in folder.glob("*/.*.tmp"):
        if re.fullmatch(r"\.[0-9a-f]{32}\.tmp", path.name) and time.time() - path.stat().st_mtime > LEFTOVER_SECONDS:
            path.unlink(missing_ok=True)


def write_description(folder: Path, config: ModelConfig, threshold: float) -> None:
    """What the results mean, for dataset_utils.rethreshold and for people."""
    content = {"config": config_to_dict(config), "threshold": threshold}
    with replacing(folder / DESCRIPTION) as file:
        file.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def merge_run_lengths(folder: Path) -> None:
    """rle.csv from the rows of every picture of the folder that has them, by name."""
    rows = [row for rows in read_record(folder / RECORD).values() for row in rows]
    paths = sorted({name for row in rows for name in row["files"] if name.startswith("rle/")})
    with replacing(folder / RUN_LENGTHS) as out:
        out.write(b"id,predicted\n")
        for path in paths:
            if (folder / path).is_file():
                with (folder / path).open("rb") as lines:
                    next(lines)
                    shutil.copyfileobj(lines, out)
