"""Print the peak of memory in megabytes of annotating one large picture with the watershed; run by test_large."""

import resource
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cv2

from annotation.engine_options import EngineOptions
from annotation.engines import Engines
from annotation.large import annotate_large
from annotation.presets import WatershedOptions
from annotation.records import FileOptions, digest_file
from annotation.tiled import TileOptions


def main() -> None:
    """Annotate with all outputs."""
    cv2.setNumThreads(1)
    path = Path(sys.argv[1])
    options = FileOptions(Path(sys.argv[2]), panels=True, geojson=True, yolo="segment")
    engines = Engines(EngineOptions(watershed=WatershedOptions(preset="fluorescence")))
    record = annotate_large(options, path, engines, "s", digest_file(path), tiles=TileOptions(1024, 128))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    sys.stdout.write(f"{peak:.1f} {record['objects']}")


if __name__ == "__main__":
    main()
