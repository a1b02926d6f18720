"""What detectors' networks take and give: letterboxed input, and raw outputs turned into boxes and masks.

Exports differ in shape, and by their shape they are told apart. A is the number of cells of all grids together, one
grid for each stride; nc the number of classes; nm that of mask prototypes:

    YOLOv8, v9, v11     (1, 4 + nc [+ nm], A)      centre and sides in input pixels, class scores
    YOLOv5, v7          (1, 3 A, 5 + nc [+ nm])    the same, an objectness, class scores; 3 anchors a cell
    YOLOX               (1, A, 5 + nc)             centre and log sides in cells, or decoded; objectness, class scores
    with NMS inside     (1, n, 6 [+ nm])           corners in input pixels, score, class; n of a thousand at most

Segment models have the prototypes (1, nm, h, w) as a second output. YOLOX takes BGR 0..255 with its padding on the
right and below, all others RGB 0..1 with the picture in the middle.
"""

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from annotation.boxes import Mask, suppress

STRIDES = ((8, 16, 32), (8, 16, 32, 64), (4, 8, 16, 32))
PAD_VALUE = 114  # grey, in every YOLO
MOST_CANDIDATES = 30_000  # that suppression looks at, the best ones
MOST_ROWS = 1000  # of an output with NMS inside
MOST_CLASSES = 1000  # where the shape does not tell, nor the file name them
TASKS = ("detect", "segment")
KNOWN = (
    "known are exports of YOLOv8, v9 and v11 (1, 4 + classes, cells), YOLOv5 and v7 (1, 3 x cells, 5 + classes), YOLOX "
    "(1, cells, 5 + classes), and any with NMS inside (1, n, 6), each detect, or segment with prototypes (1, m, h, w) "
    "as a second output"
)
COCO_NAMES = tuple(
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,"
    "bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,"
    "skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,"
    "cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,"
    "potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,"
    "refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush".split(",")
)


class DetectorError(ValueError):
    """A file is no detector that is known here; the message says what was found and what is known."""


@dataclass(frozen=True)
class Layout:
    """How to read a network's outputs.

    Attributes:
        kind: v8, v5, yolox or end2end.
        names: of the classes.
        num_masks: mask prototypes, 0 for boxes alone.
        strides: input pixels of a cell, of each grid.
        decoded: of YOLOX, whether the grid was decoded inside the network.
        boxes, protos: places of these outputs among all.
    """

    kind: str
    names: tuple[str, ...]
    num_masks: int
    strides: tuple[int, ...]
    decoded: bool = True
    boxes: int = 0
    protos: int | None = None


# ----------------------------------------------------------------------------------------------------------------------
# Input


@dataclass(frozen=True)
class Letterbox:
    """Where an image lies in a network's input: scaled to `height` x `width` pixels, at (left, top) of `size`."""

    image: tuple[int, int]
    size: tuple[int, int]
    height: int
    width: int
    left: int
    top: int

    @property
    def factors(self) -> np.ndarray:
        """Input pixels for a pixel of the image along x and y; they differ by what rounding the sides does."""
        return np.array([self.width / self.image[1], self.height / self.image[0]])

    def to_image(self, xyxy: np.ndarray) -> np.ndarray:
        """Boxes (n, 4) from pixels of the input to pixels of the image, not cut off."""
        return (xyxy - np.tile([self.left, self.top], 2)) / np.tile(self.factors, 2)

    def to_input(self, xyxy: np.ndarray) -> np.ndarray:
        """The way back."""
        return xyxy * np.tile(self.factors, 2) + np.tile([self.left, self.top], 2)


def plan_letterbox(image: tuple[int, int], size: tuple[int, int], *, centred: bool) -> Letterbox:
    """Scale (height, width) so that it just fits into a size, with the sides rounded as YOLO does.

    Args:
        centred: the picture in the middle (YOLOv5, v8), else in the upper left corner (YOLOX).
    """
    scale = min(size[0] / image[0], size[1] / image[1])
    height, width = (max(1, round(side * scale) if centred else int(side * scale)) for side in image)
    top, left = (max(0, round((size[0] - height) / 2 - 0.1)), max(0, round((size[1] - width) / 2 - 0.1)))
    if not centred:
        top, left = 0, 0
    return Letterbox(image, size, height, width, left, top)


def fit_size(image: tuple[int, int], long_side: int, stride: int) -> tuple[int, int]:
    """The smallest multiples of the stride that hold an image scaled to a long side: for inputs of free size."""
    scale = long_side / max(image)
    height, width = (max(1, -(-round(side * scale) // stride)) * stride for side in image)
    return height, width


def fill_letterbox(image: np.ndarray, box: Letterbox) -> np.ndarray:
    """Scale and pad an image (H, W, 3) uint8 to its letterbox, (h, w, 3) uint8."""
    scaled = image
    if image.shape[:2] != (box.height, box.width):
        scaled = cv2.resize(np.ascontiguousarray(image), (box.width, box.height), interpolation=cv2.INTER_LINEAR)
    padded = np.full((*box.size, 3), PAD_VALUE, np.uint8)
    padded[box.top : box.top + box.height, box.left : box.left + box.width] = scaled
    return padded


def to_input(padded: np.ndarray, kind: str, channels: int, dtype: type) -> np.ndarray:
    """A letterboxed picture (h, w, 3) uint8 RGB as the network takes it, (channels, h, w)."""
    if channels == 1:
        padded = cv2.cvtColor(padded, cv2.COLOR_RGB2GRAY)[..., None]
    values = padded.transpose(2, 0, 1).astype(np.float32)
    values = values[::-1] if kind == "yolox" else values / np.float32(255)
    return values.astype(dtype)


# ----------------------------------------------------------------------------------------------------------------------
# Which export it is


def grid_cells(size: tuple[int, int], strides: Sequence[int]) -> int:
    """Cells of all grids of an input (height, width)."""
    return sum((size[0] // stride) * (size[1] // stride) for stride in strides)


def identify(size: tuple[int, int], shapes: Sequence[tuple[int, ...]], metadata: Mapping[str, str]) -> Layout:
    """Tell an export by the shapes of its outputs for an input of (height, width).

    Args:
        shapes: of all outputs; older YOLOv5 exports have three of rank 5 beside the one that counts.
        metadata: of the file; ultralytics notes task, names and end2end there.

    Raises:
        DetectorError: anything else; says what was found and what is known.
    """
    found = f"outputs {', '.join(map(str, shapes))} for an input of {size[0]}x{size[1]}"
    _check_metadata(metadata, found)
    flat = [place for place, shape in enumerate(shapes) if len(shape) == 3]
    protos = [place for place, shape in enumerate(shapes) if len(shape) == 4]
    if len(flat) != 1 or len(protos) > 1 or any(len(shape) not in (3, 4, 5) for shape in shapes):
        raise DetectorError(f"{found}; {KNOWN}")
    rows, columns = shapes[flat[0]][1:]
    num_masks = shapes[protos[0]][1] if protos else 0
    kind, strides, classes = _match_shape(size, rows, columns, num_masks)
    names = parse_names(metadata.get("names", ""))
    if not kind or (names and 0 < classes != len(names)):
        told = f", with names of {len(names)} classes" if names else ""
        raise DetectorError(f"{found}{told}; {KNOWN}")
    names = names or name_classes(classes)
    return Layout(kind, names, num_masks, strides, True, flat[0], protos[0] if protos else None)


def _check_metadata(metadata: Mapping[str, str], found: str) -> None:
    task = metadata.get("task", "detect")
    if task not in TASKS:
        raise DetectorError(f"{found} and the task {task!r}; expected a model of the task detect or segment")
    if "rtdetr" in metadata.get("description", "").replace("-", "").lower():
        raise DetectorError(f"{found} of an RT-DETR; {KNOWN}")


def _match_shape(size: tuple[int, int], rows: int, columns: int, num_masks: int) -> tuple[str, tuple[int, ...], int]:
    """Kind, strides and number of classes (-1: not told) of an output (1, rows, columns); kind "": none fits."""
    for strides in STRIDES:
        cells = grid_cells(size, strides) if not any(side % max(strides) for side in size) else -1
        fits = {
            "v8": (columns == cells, rows - 4 - num_masks),
            "v5": (rows == 3 * cells, columns - 5 - num_masks),
            "yolox": (rows == cells and not num_masks, columns - 5),
        }
        for kind, (fit, classes) in fits.items():
            if fit and classes > 0:
                return kind, strides, classes
    if columns == 6 + num_masks and rows <= MOST_ROWS:
        return "end2end", STRIDES[0], -1
    return "", (), 0


def parse_names(text: str) -> tuple[str, ...]:
    """The names that ultralytics writes as the text of a dict or list; none when there are none, or no such text."""
    try:
        names = ast.literal_eval(text) if text else ()
    except (ValueError, SyntaxError):
        return ()
    if isinstance(names, dict):
        return tuple(str(names[number]) for number in range(len(names))) if set(names) == {*range(len(names))} else ()
    return tuple(map(str, names)) if isinstance(names, list | tuple) else ()


def name_classes(classes: int) -> tuple[str, ...]:
    """Names for a file that has none: 80 classes are taken for those of COCO; -1: their number is not known."""
    if classes == len(COCO_NAMES):
        return COCO_NAMES
    count = MOST_CLASSES if classes < 0 else classes
    return tuple(f"class_{number}" for number in range(count)) if count > 1 else ("object",)


def is_decoded(output: np.ndarray, size: tuple[int, int], strides: Sequence[int]) -> bool:
    """Whether a YOLOX output (A, 5 + nc) holds input pixels; raw, its centres are offsets of a few cells."""
    cells, steps = grid_points(size, strides)
    as_pixels = np.median(np.abs(output[:, :2] / steps[:, None] - cells))
    return bool(as_pixels < np.median(np.abs(output[:, :2])))


# ----------------------------------------------------------------------------------------------------------------------
# Outputs


@dataclass(frozen=True, eq=False)
class Found:
    """Objects in pixels of a network's input.

    Attributes:
        xyxy: (n, 4) float64. scores: (n,) float32. classes: (n,) int64.
        coefficients: (n, nm) float32 of the mask prototypes; nm is 0 for boxes alone.
    """

    xyxy: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    coefficients: np.ndarray


def grid_points(size: tuple[int, int], strides: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Places (A, 2) as x, y of the cells in their grids, grid after grid, and the stride of each, (A,)."""
    places, steps = [], []
    for stride in strides:
        rows, columns = size[0] // stride, size[1] // stride
        y, x = np.mgrid[:rows, :columns]
        places.append(np.stack([x.ravel(), y.ravel()], axis=1))
        steps.append(np.full(rows * columns, stride))
    return np.concatenate(places).astype(np.float64), np.concatenate(steps).astype(np.float64)


def decode(layout: Layout, output: np.ndarray, size: tuple[int, int], confidence: float, iou: float) -> Found:
    """Read the main output of one image; boxes of one class that overlap by more than `iou` are one object.

    Args:
        output: without the batch axis, as the layout says.
        size: (height, width) of the input.
        confidence: lowest score; that of YOLOv5 and YOLOX is objectness times class score.
        iou: limit of the non-maximum suppression; an end2end export has done its own.

    Returns:
        Objects, best first.
    """
    table = np.asarray(output.T if layout.kind == "v8" else output, np.float32)
    if layout.kind == "end2end":
        kept = np.flatnonzero(table[:, 4] >= confidence)
        found = Found(table[kept, :4].astype(np.float64), table[kept, 4], table[kept, 5].astype(int), table[kept, 6:])
        return _take(found, np.argsort(-found.scores, kind="stable"))
    first = 4 if layout.kind == "v8" else 5
    scores = table[:, first : first + len(layout.names)]
    classes = scores.argmax(axis=1)
    best = scores[np.arange(len(scores)), classes]
    if first == 5:
        best = best * table[:, 4]
    kept = np.flatnonzero(best >= confidence)
    if len(kept) > MOST_CANDIDATES:
        kept = np.sort(kept[np.argsort(-best[kept], kind="stable")[:MOST_CANDIDATES]])
    boxes = table[kept, :4].astype(np.float64)
    if not layout.decoded:
        places, steps = grid_points(size, layout.strides)
        boxes[:, :2] = (boxes[:, :2] + places[kept]) * steps[kept, None]
        boxes[:, 2:] = np.exp(np.minimum(boxes[:, 2:], 20)) * steps[kept, None]
    corners = np.hstack([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2])
    found = Found(corners, best[kept], classes[kept], table[kept, first + len(layout.names) :])
    found = _take(found, np.flatnonzero(np.isfinite(corners).all(axis=1)))
    return _take(found, suppress(found.xyxy, found.scores, found.classes, iou))


def _take(found: Found, kept: np.ndarray) -> Found:
    return Found(found.xyxy[kept], found.scores[kept], found.classes[kept], found.coefficients[kept])


def cut_mask(logits: np.ndarray, xyxy: np.ndarray, box: Letterbox) -> Mask:
    """The mask of one object inside its box, at the image's resolution: where bilinear logits are above 0.

    Args:
        logits: (h, w) float32, coefficients times prototypes, over the whole input.
        xyxy: its box in pixels of the image, inside the image.

    Returns:
        (left, top) of the crop and the crop, bool: the pixels whose centres lie in the box, at least one.
    """
    first = np.ceil(xyxy[:2] - 0.5).astype(int).clip(0, [box.image[1] - 1, box.image[0] - 1])
    after = np.maximum(np.ceil(xyxy[2:] - 0.5).astype(int), first + 1)
    offsets, places = (box.left, box.top), []
    for axis in (0, 1):
        inside = (np.arange(first[axis], after[axis]) + 0.5) * box.factors[axis] + offsets[axis]
        places.append(inside * logits.shape[1 - axis] / box.size[1 - axis] - 0.5)
    return (int(first[0]), int(first[1])), _interpolate(logits, places[1], places[0]) > 0


def _interpolate(values: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Bilinear values at rows x columns, fractional places; beyond the edge the edge goes on."""
    for axis, places in enumerate((rows, columns)):
        places = places.clip(0, values.shape[axis] - 1)
        low = np.floor(places).astype(int)
        high = np.minimum(low + 1, values.shape[axis] - 1)
        weight = (places - low).astype(np.float32)
        weight = weight[:, None] if axis == 0 else weight
        values = values.take(low, axis) * (1 - weight) + values.take(high, axis) * weight
    return values
