"""Print by how many megabytes the peak grows: a slide scanned, indexed and sampled; then scored too.

Run by test_slides_training.
"""

import resource
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from augmentations import Augmentation
from checkpoint import Geometry, ModelConfig
from classes import ClassMap
from dataset import EvaluationSet, Slot, TrainingSet
from pairing import Pair
from scan import scan_pairs
from slide_windows import SlideOptions


def peak() -> float:
    """Most memory this process ever had, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Do everything that training does with a slide."""
    torch.set_num_threads(1)
    pair = Pair("s", Path(sys.argv[1]), Path(sys.argv[2]))
    geometry = Geometry("crops", (256, 256), 512, 128, 32)
    names = ("background", "object")
    config = ModelConfig(
        "x", "x", (1,), names, ("r", "g", "b"), (200.0,) * 3, (30.0,) * 3, geometry, stride=1, min_side=1, batch=2
    )
    classes, augmentation = (
        ClassMap((1,), names),
        Augmentation("light", rgb=True, value_range=((0.0,) * 3, (255.0,) * 3)),
    )
    torch.zeros(3, 8, 8).mean()
    before = peak()
    (facts,) = scan_pairs([pair], slides=SlideOptions())
    assert not facts.layers[0].error and facts.mask and len(facts.mask.labels) == 2
    data = TrainingSet([pair], classes, config, augmentation)
    for seed in range(60):
        data[(Slot(0, seed, 1 if seed % 2 else None),)]
    trained = peak() - before
    forward = lambda batch: np.ascontiguousarray(1 - batch[:, :1].clip(-1, 1) / 2 - 0.5)  # noqa: E731
    evaluation = EvaluationSet([pair], classes, config)
    predictions = evaluation.predict_samples(forward, evaluation, workers=0)
    result = evaluation.evaluate(predictions, evaluation.build_scorer(config), keep_worst=1)
    assert result.summary["pixels"] == 12_000 * 12_000
    sys.stdout.write(f"{trained:.1f} {peak() - before:.1f}")


if __name__ == "__main__":
    main()
