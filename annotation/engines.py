"""Engines with their networks loaded: they look at an image, one prompts another, their objects become one set."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from annotation import detectors, merging, slicing
from annotation.boxes import Boxes
from annotation.engine_options import EngineOptions, fields_of
from annotation.instances import Instances
from image_io import read_image

Cache = dict[Any, Any]  # what was found in one image before, see Engines.find


class Engines:
    """The engines of a run with their networks loaded, each once.

    Attributes:
        chosen: preset and object_size that the watershed chose for the last image; empty without it.
    """

    chosen: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, options: EngineOptions, *, megapixels: float | None = None) -> None:
        """Load what the options name.

        Args:
            megapixels: what a trained network is to see in all, for its backend auto.
        """
        self.options = options
        self.notes: list[str] = []
        self._detector: Any = None
        self._sam: Any = None
        self._trained: Any = None
        self._limits: tuple[float, float] | None = None  # of what detectors are shown, see fixed
        self._sam_limits: tuple[float, float] | None = None
        if "yolo" in options.parts:
            self._detector = detectors.load_detector(options.detector, options.device)
            if self._detector.note:
                self.notes.append(f"{self._detector.name}: {self._detector.note}")
        if "sam" in options.parts and options.sam_path is not None:
            from annotation.sam import load_sam

            self._sam = load_sam(options.sam_path, options.device, options.sam)
        if "model" in options.parts and options.trained is not None:
            from annotation.trained import load_trained

            self._trained = load_trained(options.trained, options.device, megapixels=megapixels)
            self.notes.append(f"{options.trained.path}: {self._trained.note}")

    def all_notes(self) -> list[str]:
        """What is to be said about the networks, and about the images so far."""
        return [*self.notes, *(self._trained.notes if self._trained else ())]

    def changed(self, options: EngineOptions) -> "Engines":
        """The same networks, which are not loaded again, with other settings."""
        other = object.__new__(Engines)
        other.options, other.notes = options, self.notes
        other._limits, other._sam_limits = self._limits, self._sam_limits
        other._detector = self._detector and self._detector.changed(options.detector)
        other._sam, other._trained = self._sam, self._trained
        if self._sam is not None:
            from annotation.sam_engine import Sam

            other._sam = Sam(self._sam.network, options.sam, self._sam_limits)
        if self._trained is not None:
            other._trained = self._trained.with_options(options.trained)
        return other

    def fixed(self, sample: np.ndarray) -> "Engines":
        """The same with all that is automatic chosen from a sample, so that parts of one image are treated alike."""
        options = self.options
        if "watershed" in options.parts:
            from annotation.watershed import choose_options

            options = replace(options, watershed=choose_options(sample, options.watershed))
        from plots import display_limits

        other = self.changed(options)
        other._limits, other._sam_limits = detectors.display_range(sample), display_limits(sample)
        return other.changed(options)

    def find(self, image: np.ndarray, cache: Cache | None = None) -> tuple[Instances, dict[str, Instances]]:
        """The objects of an image (H, W, C), RGB then extras, and those of each engine.

        Args:
            cache: kept from call to call for one image; engines whose settings are the same do not work again.
        """
        cache = {} if cache is None else cache
        parts = {name: self._run(name, image, cache) for name in self.options.names}
        if len(parts) == 1:
            return next(iter(parts.values())), parts
        return merging.merge(list(parts.values()), self.options.merge), parts

    def _run(self, name: str, image: np.ndarray, cache: Cache) -> Instances:
        """One engine, prompted by another where the name has two."""
        own = fields_of(set(name.split("+"))) - {"names", "merge"}
        key = tuple(repr(getattr(self.options, field)) for field in sorted(own))
        first, _, second = name.partition("+")

        def look() -> Instances:
            if not second:
                return self._look(name, image, cache)
            return rename(self._sam.segment_boxes(image, self._boxes(first, image, cache)), name)

        return _keep(cache, name, key, look)

    def _look(self, name: str, image: np.ndarray, cache: Cache) -> Instances:
        """One engine by itself."""
        if name == "watershed":
            from annotation.watershed import choose_options, segment

            options = self.options.watershed
            if None in vars(options).values():
                options = choose_options(image, options)
            self.chosen = {"preset": options.preset, "object_size": round(options.size, 1)}
            return segment(image, options)
        if name == "yolo":
            return detectors.boxes_to_instances(self._detect(image, cache), *image.shape[:2])
        return self._sam.segment_everything(image) if name == "sam" else self._trained.segment(image, cache)

    def _detect(self, image: np.ndarray, cache: Cache) -> Boxes:
        options = self.options
        return _keep(
            cache,
            "boxes",
            (repr(options.detector), repr(options.slices)),
            lambda: slicing.detect_sliced(self._detector, image, options.slices, self._limits),
        )

    def _boxes(self, name: str, image: np.ndarray, cache: Cache) -> np.ndarray:
        """What prompts SAM: (n, 4) left, top, right, bottom."""
        if name == "yolo":
            return self._detect(image, cache).xyxy
        found = self._run(name, image, cache)
        return merging.boxes_of(found.labels, len(found))[:, [1, 0, 3, 2]]


def _keep(cache: Cache, name: str, key: Any, make: Callable[[], Any]) -> Any:
    """What `make` gives for a key; of each name two results are kept: the first, in tuning the default's, and the last.

    A search tries hundreds of settings, and label maps are large.
    """
    kept = cache.setdefault(name, {})
    if key not in kept:
        result = make()
        if len(kept) > 1:
            kept.popitem()
        kept[key] = result
    return kept[key]


def rename(found: Instances, engine: str) -> Instances:
    """The same objects, said to be found by another name."""
    return replace(found, engines=(engine,) * len(found))


def choose_for_video(options: EngineOptions, frames: Sequence[Path]) -> EngineOptions:
    """The options with what the watershed chooses from some frames of a video: chosen for each, curves would jump.

    Raises:
        ImageError, OSError: a frame cannot be read.
    """
    if "watershed" not in options.parts or not frames:
        return options
    from annotation.watershed import choose_options

    some = [frames[place] for place in sorted({0, len(frames) // 2, len(frames) - 1})]
    sample = np.concatenate([read_image(path) for path in some])
    return replace(options, watershed=choose_options(sample, options.watershed))
