"""What TensorBoard shows of an annotation run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from annotation.records import FileOptions, read_record
from events import EventWriter
from image_io import read_image

PREVIEWS = 8  # pictures


def log_previews(folder: Path, files: FileOptions, records: Sequence[Mapping[str, Any]]) -> None:
    """Write counts, previews and a histogram of sizes into a run folder.

    Args:
        folder: of the run.
        files: where overlays and records lie.
        records: of the images of this run.
    """
    with EventWriter(folder) as writer:
        diameters = []
        for number, record in enumerate(records):
            table = (read_record(files, record["stem"]) or {}).get("table", {})
            diameters.append(np.array(table.get("equivalent_diameter", ()), np.float64))
            writer.add_scalar("annotate/objects", record["objects"], number)
            writer.add_scalar("annotate/coverage", record["coverage"], number)
        sizes = np.concatenate(diameters)
        if len(sizes):
            writer.add_histogram("annotate/equivalent diameter (pixels)", sizes)
        for record in records[:: max(1, len(records) // PREVIEWS)][:PREVIEWS]:
            path = files.place("overlays", record["stem"])
            if files.overlays and path.is_file():  # others may show the objects of an earlier run
                writer.add_image(f"annotate/{record['stem']}", read_image(path))
