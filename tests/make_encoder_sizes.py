"""Write networks/encoder_sizes.json, which train.py --list-models reads: a few minutes, without a download.

Run again when timm or segmentation-models-pytorch is updated: python -m tests.make_encoder_sizes
"""

import json
import resource
import sys
import warnings
from pathlib import Path

import segmentation_models_pytorch as smp
import timm

from model import ARCHITECTURES, list_encoders
from model_list import SIZES_FILE, measure_architecture, measure_encoder

MEMORY = 8 << 30  # bytes


def main() -> None:
    """Build every network once on the meta device, where weights take no memory."""
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))  # the largest must not take the machine with them
    names = list_encoders()
    encoders = {}
    for number, name in enumerate(names):
        encoders[name] = measure_encoder(name)
        if number % 20 == 0:
            sys.stderr.write(f"{number} of {len(names)}: {name} {encoders[name]}\n")
    sizes = {
        "versions": {"timm": timm.__version__, "segmentation-models-pytorch": smp.__version__},
        "architectures": {name: measure_architecture(name) for name in ARCHITECTURES},
        "encoders": encoders,
    }
    lines = json.dumps(sizes, ensure_ascii=False).replace("], ", "],\n").replace("}, ", "},\n")
    Path(SIZES_FILE).write_text(lines + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
