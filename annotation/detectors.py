"""Detectors that find boxes, or boxes with masks: ONNX exports of the YOLO family, and `.pt` files of ultralytics.

ONNX files run in ONNX Runtime and need no other package; what they hold is told in decoding.py. A `.pt` file needs
ultralytics, which the user installs: its licence is AGPL-3.0, and loading such a file runs code that it holds.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from annotation import decoding
from annotation.boxes import Boxes, Mask, clip_boxes, no_boxes
from annotation.decoding import KNOWN, DetectorError, Found, Layout, Letterbox
from annotation.detector_options import DetectorOptions
from annotation.instances import Instances, paste_masks

FREE_SIDE = 640  # of networks that take any size and do not say which they were trained on
PROBE_SIDES = (256, 320)  # an input of two different sides tells rows from columns
GPU_BATCH = 8
BAND_PIXELS = 1 << 20  # of deep images, stretched at a time
DISPLAY_SIDE = 1000  # rows and columns that the stretch of deep images looks at, at most twice as many


class Detector(Protocol):
    """What finds boxes in a picture.

    Attributes:
        name: of the file, for tables.
        names: of the classes.
        side: longest side of the network's input, in pixels.
        free: whether the network takes inputs of other sizes too.
        batch: pictures at a time that it is best asked for.
        note: what the user should know about how it runs, or nothing.
    """

    name: str
    names: tuple[str, ...]
    side: int
    free: bool
    batch: int
    note: str

    def detect(self, images: Sequence[np.ndarray], side: int | None = None) -> list[Boxes]:
        """Find objects in RGB pictures (H, W, 3) uint8, whose sizes may differ.

        Args:
            images: the pictures.
            side: longest side that they are scaled to, for a network that takes inputs of any size.

        Returns:
            For each picture its boxes, inside it and best first.
        """

    def changed(self, options: DetectorOptions) -> "Detector":
        """The same network, which is not loaded again, with other limits: confidence and iou."""


def load_detector(options: DetectorOptions, device: str = "cpu") -> Detector:
    """Load the detector that the options name.

    Args:
        options: with weights.
        device: cpu, cuda, cuda:N or mps. Where ONNX Runtime cannot use it, an .onnx file runs on the CPU; the
            detector's note says so.

    Raises:
        FileNotFoundError: there is no such file.
        DetectorError: it is no detector that is known, lacks the package it needs, or has no such class.
    """
    path = options.weights
    if path is None or not path.is_file():
        raise FileNotFoundError(f"no detector {path}; expected an .onnx file or a .pt file of ultralytics")
    if path.suffix.lower() == ".onnx":
        return OnnxDetector(path, options, device)
    if path.suffix.lower() == ".pt":
        return UltralyticsDetector(path, options, device)
    raise DetectorError(f"{path} is a {path.suffix or 'nameless'} file; expected .onnx, or .pt of ultralytics")


def pick_classes(wanted: Sequence[str], names: Sequence[str], path: Path) -> np.ndarray | None:
    """Numbers of the classes that were asked for by name or number; None: all count.

    Raises:
        DetectorError: the detector has no such class.
    """
    if not wanted:
        return None
    numbers = {name: number for number, name in enumerate(names)} | {str(n): n for n in range(len(names))}
    unknown = [word for word in wanted if word not in numbers]
    if unknown:
        shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
        raise DetectorError(f"{path} has no class {unknown[0]!r}; expected some of {shown}, or their numbers from 0")
    return np.array([numbers[word] for word in wanted])


# ----------------------------------------------------------------------------------------------------------------------
# Pictures


def display_range(image: np.ndarray) -> tuple[float, float] | None:
    """The values of an image (H, W, C) that become 0 and 255, the percentiles 0.5 and 99.5; None: 8 bit stay."""
    if image.dtype == np.uint8:
        return None
    steps = (max(1, side // DISPLAY_SIDE) for side in image.shape[:2])
    thinned = image[tuple(slice(None, None, step) for step in steps)][..., : 3 if image.shape[2] >= 3 else 1]
    finite = thinned[np.isfinite(thinned)]
    return tuple(np.percentile(finite, (0.5, 99.5)).tolist()) if finite.size else (0.0, 0.0)  # type: ignore[return-value]


def to_rgb8(image: np.ndarray, limits: tuple[float, float] | None = None) -> np.ndarray:
    """Bring any image, or a part of one, to what a detector takes.

    8-bit values stay as they are. Deeper ones are stretched, all channels alike. Of one or two channels the first
    becomes grey, of more the first three are RGB: alpha and further bands are left out.

    Args:
        image: (H, W, C) uint8, uint16 or float32; NaN and infinite values become the lowest.
        limits: display_range of the whole image, for a part; None: of this one.

    Returns:
        (H, W, 3) uint8.
    """
    shown = image[..., :3] if image.shape[2] >= 3 else image[..., :1]
    if image.dtype == np.uint8:
        return np.ascontiguousarray(np.broadcast_to(shown, (*shown.shape[:2], 3)))
    low, high = limits or display_range(image) or (0.0, 0.0)
    scale = 255 / (high - low) if high > low else 0.0
    result = np.empty((*shown.shape[:2], 3), np.uint8)
    rows = max(1, BAND_PIXELS // shown.shape[1])
    for top in range(0, len(shown), rows):
        values = np.nan_to_num(shown[top : top + rows].astype(np.float32), nan=low, posinf=low, neginf=low)
        values = np.clip((values - np.float32(low)) * np.float32(scale), 0, 255)
        result[top : top + rows] = np.rint(values)
    return result


# ----------------------------------------------------------------------------------------------------------------------
# ONNX


class OnnxDetector:
    """An ONNX export of a YOLO; see decoding.py for those that are known."""

    def __init__(self, path: Path, options: DetectorOptions, device: str = "cpu") -> None:
        from onnx_export import make_session, read_onnx

        self.name, self.note = path.stem, ""
        self._path, self._options = path, options
        content = read_onnx(path)
        try:
            usable, self.note = usable_device(device)
            self._session = make_session(content, usable)
        except ValueError as error:
            raise DetectorError(f"{path}: {error}; expected an ONNX export of a YOLO. {KNOWN}") from error
        metadata = dict(self._session.get_modelmeta().custom_metadata_map)
        self._read_input(metadata)
        self._layout = self._probe(metadata)
        self.names = self._layout.names
        self._classes = pick_classes(options.classes, self.names, path)
        self.batch = self._fixed_batch or (GPU_BATCH if usable != "cpu" else 1)

    def changed(self, options: DetectorOptions) -> "OnnxDetector":
        """See Detector."""
        other = copy.copy(self)
        other._options = replace(self._options, confidence=options.confidence, iou=options.iou)
        return other

    def _read_input(self, metadata: dict[str, str]) -> None:
        """Size, type and channels of the input; sides that are names are free."""
        inputs = self._session.get_inputs()
        found = ", ".join(f"{item.name} {item.type} {item.shape}" for item in inputs)
        types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        fixed = [side if isinstance(side, int) and side > 0 else None for side in inputs[0].shape]
        known = len(inputs) == 1 and inputs[0].type in types and len(fixed) == 4 and fixed[1] in (1, 3, None)
        if not known or (fixed[2] is None) != (fixed[3] is None):
            raise DetectorError(
                f"{self._path} has the inputs {found}; expected one, float (batch, 3 or 1, height, width) with both "
                f"sides fixed or both free. {KNOWN}"
            )
        self._input, self._dtype = inputs[0].name, types[inputs[0].type]
        self._fixed_batch, self._channels = fixed[0], fixed[1] or int(metadata.get("channels", "3"))
        self._size = (fixed[2], fixed[3]) if fixed[2] and fixed[3] else None
        self.free = self._size is None
        sides = [int(side) for side in decoding.parse_names(metadata.get("imgsz", "")) if side.isdecimal()]
        self.side = max(self._size or (self._options.size or max(sides, default=FREE_SIDE),))
        if self._size and self._options.size not in (None, self.side):
            raise DetectorError(
                f"{self._path} takes {self._size[0]}x{self._size[1]} pixels alone, found the size "
                f"{self._options.size}: leave --detector-size out, or export it with free sides (dynamic=True)"
            )

    def _probe(self, metadata: dict[str, str]) -> Layout:
        """Run the network once, on grey, to see the shapes of its outputs, and whether YOLOX has decoded its grid."""
        size = self._size or PROBE_SIDES
        grey = np.full((*size, 3), decoding.PAD_VALUE, np.uint8)
        outputs = self._run([decoding.to_input(grey, "", self._channels, self._dtype)])
        try:
            layout = decoding.identify(size, [output.shape for output in outputs], metadata)
        except DetectorError as error:
            raise DetectorError(f"{self._path} has {error}") from error
        if layout.kind != "yolox":
            return layout
        outputs = self._run([decoding.to_input(grey, "yolox", self._channels, self._dtype)])
        decoded = decoding.is_decoded(outputs[layout.boxes][0].astype(np.float64), size, layout.strides)
        return Layout(layout.kind, layout.names, 0, layout.strides, decoded, layout.boxes)

    def _run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """All outputs for inputs (C, h, w) of one size; a fixed batch is filled up with the last one.

        Raises:
            DetectorError: ONNX Runtime failed; the message names the file.
        """
        wanted = self._fixed_batch or len(inputs)
        batch = np.stack([*inputs, *[inputs[-1]] * (wanted - len(inputs))])
        try:
            return self._session.run(None, {self._input: batch})
        except Exception as error:  # its errors have no common class
            first = str(error).strip().splitlines()[0]
            raise DetectorError(
                f"{self._path} failed on a batch of shape {batch.shape} ({first}); expected a YOLO that takes it: "
                "export it again, with free sides (dynamic=True) or another size"
            ) from error

    def detect(self, images: Sequence[np.ndarray], side: int | None = None) -> list[Boxes]:
        """See Detector."""
        planned = [self._plan(image.shape[:2], side) for image in images]  # type: ignore[arg-type]
        found: list[Boxes] = []
        start = 0
        while start < len(images):
            stop = start + 1
            while stop < len(images) and stop - start < self.batch and planned[stop].size == planned[start].size:
                stop += 1
            found += self._detect_batch(images[start:stop], planned[start:stop])
            start = stop
        return found

    def _plan(self, image: tuple[int, int], side: int | None) -> Letterbox:
        size = self._size
        if size is None:
            size = decoding.fit_size(image, side or self.side, max(self._layout.strides))
        return decoding.plan_letterbox(image, size, centred=self._layout.kind != "yolox")

    def _detect_batch(self, images: Sequence[np.ndarray], boxes: Sequence[Letterbox]) -> list[Boxes]:
        layout = self._layout
        filled = [decoding.fill_letterbox(image, box) for image, box in zip(images, boxes, strict=True)]
        outputs = self._run([decoding.to_input(each, layout.kind, self._channels, self._dtype) for each in filled])
        found = []
        for place, box in enumerate(boxes):
            options = self._options
            raw = decoding.decode(layout, outputs[layout.boxes][place], box.size, options.confidence, options.iou)
            protos = None if layout.protos is None else np.asarray(outputs[layout.protos][place], np.float32)
            found.append(self._to_boxes(raw, protos, box))
        return found

    def _to_boxes(self, raw: Found, protos: np.ndarray | None, box: Letterbox) -> Boxes:
        """Objects of the input as objects of the image, cut to it; those outside and other classes are dropped."""
        height, width = box.image
        limits = np.array([0.0, 0.0, width, height])
        xyxy = clip_boxes(box.to_image(raw.xyxy), limits)
        kept = (xyxy[:, 2] > xyxy[:, 0]) & (xyxy[:, 3] > xyxy[:, 1])
        if self._classes is not None:
            kept &= np.isin(raw.classes, self._classes)
        kept &= (raw.classes >= 0) & (raw.classes < len(self.names))
        numbers = np.flatnonzero(kept)
        masks = None
        if protos is not None:
            flat, shape = protos.reshape(len(protos), -1), protos.shape[1:]
            logits = ((raw.coefficients[i] @ flat).reshape(shape) for i in numbers)
            masks = [decoding.cut_mask(each, xyxy[i], box) for each, i in zip(logits, numbers, strict=True)]
        return Boxes(xyxy[numbers], raw.scores[numbers].clip(0, 1), raw.classes[numbers], self.names, masks)


def usable_device(device: str) -> tuple[str, str]:
    """The device that ONNX Runtime can use for a device of PyTorch, and what to tell the user when it is another."""
    from onnx_export import find_provider

    if device == "cpu":
        return device, ""
    try:
        find_provider(device)
    except ValueError:
        return "cpu", f"the detector runs on the CPU: the installed ONNX Runtime cannot use {device}"
    return device, ""


# ----------------------------------------------------------------------------------------------------------------------
# ultralytics


class UltralyticsDetector:
    """A `.pt` file of ultralytics, run by ultralytics itself."""

    def __init__(self, path: Path, options: DetectorOptions, device: str = "cpu") -> None:
        self._model = _load_ultralytics(path)
        self.name, self.note, self.batch, self.free = path.stem, "", 1 if device == "cpu" else GPU_BATCH, True
        names = self._model.names
        self.names = tuple(names[number] for number in sorted(names))
        trained = getattr(self._model, "overrides", {}).get("imgsz", FREE_SIDE)
        self.side = options.size or int(max(trained) if isinstance(trained, list | tuple) else trained)
        self._classes = pick_classes(options.classes, self.names, path)
        self._options, self._device = options, device

    def detect(self, images: Sequence[np.ndarray], side: int | None = None) -> list[Boxes]:
        """See Detector; ultralytics takes arrays as BGR."""
        found = []
        for image in images:
            results = self._model.predict(
                np.ascontiguousarray(image[..., ::-1]),
                conf=self._options.confidence,
                iou=self._options.iou,
                imgsz=side or self.side,
                device=self._device,
                classes=None if self._classes is None else self._classes.tolist(),
                retina_masks=True,
                verbose=False,
                save=False,
            )
            found.append(self._to_boxes(results[0], image.shape[:2]))  # type: ignore[arg-type]
        return found

    def changed(self, options: DetectorOptions) -> "UltralyticsDetector":
        """See Detector."""
        other = copy.copy(self)
        other._options = replace(self._options, confidence=options.confidence, iou=options.iou)
        return other

    def _to_boxes(self, result: Any, size: tuple[int, int]) -> Boxes:
        if result.boxes is None:
            return no_boxes(self.names)
        table = result.boxes.data.cpu().numpy()
        xyxy = clip_boxes(table[:, :4].astype(np.float64), np.array([0, 0, size[1], size[0]]))
        masks = None
        if result.masks is not None:
            masks = [_crop_mask(mask, box) for mask, box in zip(result.masks.data.cpu().numpy(), xyxy, strict=True)]
        boxes = Boxes(xyxy, table[:, 4], table[:, 5], self.names, masks)
        return boxes.take((xyxy[:, 2] > xyxy[:, 0]) & (xyxy[:, 3] > xyxy[:, 1]))


def _load_ultralytics(path: Path) -> Any:
    try:
        import ultralytics
    except ImportError as error:
        raise DetectorError(
            f"{path} needs the package ultralytics, which is not installed: pip install ultralytics (its licence is "
            "AGPL-3.0), or export the file once to ONNX, which needs no package: yolo export model=FILE format=onnx"
        ) from error
    try:
        model = ultralytics.YOLO(str(path))
        if model.task not in decoding.TASKS:
            raise DetectorError(f"{path} is a model of the task {model.task!r}; expected detect or segment")
    except DetectorError:
        raise
    except Exception as error:  # whatever unpickling raises
        raise DetectorError(f"{path} is no model of ultralytics ({error}); expected one that it has saved") from error
    return model


def _crop_mask(mask: np.ndarray, xyxy: np.ndarray) -> Mask:
    left, top = np.floor(xyxy[:2]).astype(int).tolist()
    right, bottom = np.ceil(xyxy[2:]).astype(int).tolist()
    return (left, top), mask[top : max(bottom, top + 1), left : max(right, left + 1)] > 0.5


# ----------------------------------------------------------------------------------------------------------------------
# Instances


def boxes_to_instances(boxes: Boxes, height: int, width: int, engine: str = "yolo") -> Instances:
    """Objects of boxes as a label map: the masks of a segment model; else the ellipse that fits into each box.

    Where objects overlap the higher score keeps the pixels.

    Args:
        boxes: in pixels of the picture.
        height, width: of the picture.
        engine: name for the tables.
    """
    masks = boxes.masks
    if masks is None:
        masks = [ellipse_mask(box, height, width) for box in boxes.xyxy.astype(np.float64)]
    return paste_masks(masks, boxes.scores, height, width, engine)


def ellipse_mask(xyxy: np.ndarray, height: int, width: int) -> Mask:
    """The ellipse inside a box as ((left, top), bool crop): pixels whose centres lie in it, the middle one at least."""
    low = np.floor(xyxy[:2]).clip(0, [width - 1, height - 1]).astype(int)
    high = np.maximum(np.ceil(xyxy[2:]).clip(0, [width, height]).astype(int), low + 1)
    centre, radii = (xyxy[:2] + xyxy[2:]) / 2, np.maximum((xyxy[2:] - xyxy[:2]) / 2, 0.5)
    x, y = (((np.arange(low[i], high[i]) + 0.5 - centre[i]) / radii[i]) ** 2 for i in (0, 1))
    crop = (y[:, None] + x) <= 1
    column, row = (np.floor(centre).astype(int) - low).clip(0, high - low - 1)
    crop[row, column] = True
    return (int(low[0]), int(low[1])), crop
