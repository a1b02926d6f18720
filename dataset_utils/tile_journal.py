"""What was cut already, so that a run that was killed goes on: a line for each row of tiles of each slide."""

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import astuple
from pathlib import Path
from typing import Any

from dataset_utils.tile_cutting import ANNOTATED, EMPTY, Layout, RowResult, Tile
from dataset_utils.tile_masks import file_signature
from image_io import write_text
from pairing import DatasetError

RECORD = "tiles.json"
FOLDER = ".tiles"
FORMAT = 2  # raised when the same flags cut other tiles


def claim_folder(folder: Path, flags: Mapping[str, Any]) -> None:
    """Take a folder for the tiles of some flags; a new or empty one, or that of an earlier run with the same flags.

    Raises:
        DatasetError: the folder holds something else.
    """
    wanted = json.loads(json.dumps({"format": FORMAT, **flags}))
    path = folder / RECORD
    if folder.exists() and not folder.is_dir():
        raise DatasetError(f"{folder} is a file; expected a folder for the tiles: give another name")
    if path.is_file():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            differ = [
                f"{key} {found.get(key)} there, {wanted[key]} asked" for key in wanted if found.get(key) != wanted[key]
            ]
        except (ValueError, AttributeError) as error:
            raise DatasetError(f"{path} is damaged ({error}); give another folder, or delete this one") from error
        if differ:
            raise DatasetError(
                f"{folder} holds tiles that were cut with other flags ({'; '.join(differ)}); expected the same flags: "
                "give another folder, or delete this one"
            )
    elif folder.is_dir() and any(folder.iterdir()):
        raise DatasetError(f"{folder} holds other files; expected a new or empty folder for the tiles: give another")
    else:
        write_text(path, json.dumps(wanted, indent=2) + "\n")


def remove_leftovers(layouts: Iterable[Layout]) -> None:
    """Delete the hidden half-written files that a kill left among the tiles."""
    folders = {layout.job.folder / name for layout in layouts for name in layout.folders}
    for folder in folders:
        for path in folder.glob(".*.tmp"):
            if re.fullmatch(r"\.[0-9a-f]{32}\.tmp", path.name):
                path.unlink(missing_ok=True)


class Journal:
    """The rows of tiles of one slide that are done; `rows` by number."""

    def __init__(self, folder: Path, layout: Layout, side: str) -> None:
        """Read what an earlier run left; when the slide or its annotation changed, remove those tiles and begin anew.

        Args:
            folder: of the whole run. side: "train", "val" or "" of this slide.

        Raises:
            DatasetError: the earlier run put the slide on the other side of the split.
        """
        self.layout = layout
        self.path = folder / FOLDER / f"{layout.job.name}.jsonl"
        self.rows: dict[int, RowResult] = {}
        head = {"slide": file_signature(layout.job.path), "mask": layout.job.mask.signature, "side": side}
        lines = self._read_lines()
        old = lines[0] if lines else None
        if old and old.get("side") != side:
            raise DatasetError(
                f"{layout.job.name} is in {old.get('side') or 'no split'} in {folder}, with the slides given now it "
                f"would be in {side or 'no split'}; expected the slides of the earlier run: give another folder"
            )
        for line in lines[1:]:
            tiles = [Tile(*tile[:4], {int(k): v for k, v in tile[4].items()}) for tile in line["tiles"]]  # type: ignore[call-arg]
            self.rows[line["row"]] = RowResult(layout.job.name, line["row"], tiles, line["findings"])
        self.changed = bool(old) and old != head
        if self.changed:
            self.remove_files(tile for row in self.rows.values() for tile in row.tiles)
            self.rows.clear()
        if old != head:
            write_text(self.path, json.dumps(head) + "\n")
        self.rows = {number: row for number, row in self.rows.items() if self._is_whole(row)}

    def _read_lines(self) -> list[dict[str, Any]]:
        """The lines of the file; what a kill cut off at its end is cut off the file too."""
        if not self.path.is_file():
            return []
        lines, good = [], 0
        data = self.path.read_bytes()
        for line in data.splitlines(keepends=True):
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
            if not line.endswith(b"\n"):
                lines.pop()
                break
            good += len(line)
        if good < len(data):
            with self.path.open("r+b") as file:
                file.truncate(good)
        return lines

    def _is_whole(self, row: RowResult) -> bool:
        """Whether the files of a row are there that were written with it."""
        kinds = (ANNOTATED, EMPTY) if self.layout.job.options.write_empty else (ANNOTATED,)
        wanted = [path for tile in row.tiles if tile.kind in kinds for path in self.files(tile)]
        return all(path.is_file() for path in wanted)

    def files(self, tile: Tile) -> tuple[Path, Path]:
        """Image and mask of a tile."""
        return self.layout.files(tile.row, tile.column)

    def add(self, row: RowResult) -> None:
        """Keep a row; it is on the disk when this returns."""
        self.rows[row.row] = row
        line = {"row": row.row, "tiles": [astuple(tile) for tile in row.tiles], "findings": row.findings}
        with self.path.open("a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def remove_files(self, tiles: Iterable[Tile]) -> None:
        """Delete the files of tiles, those that are there."""
        for tile in tiles:
            for path in self.files(tile):
                path.unlink(missing_ok=True)
