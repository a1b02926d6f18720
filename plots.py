"""Pictures for people: masks over images, panels that compare a prediction with the truth, learning curves.

Pixels are drawn by OpenCV and Pillow, curves by matplotlib, which is imported when it is needed, without a window.
Colours are those of Okabe and Ito and of Paul Tol, which colour-blind people tell apart.
"""

import colorsys
import io
import itertools
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from image_io import IGNORE_INDEX, atomic_write

Colour = tuple[int, int, int]  # RGB, 0..255

PALETTE: tuple[Colour, ...] = (
    *((86, 180, 233), (230, 159, 0), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167)),
    *((136, 34, 85), (153, 153, 51), (51, 34, 136), (170, 68, 153), (17, 119, 51), (204, 102, 119), (221, 204, 119)),
)
TRUE_POSITIVE, FALSE_POSITIVE, FALSE_NEGATIVE = (0, 158, 115), (213, 94, 0), (240, 228, 66)
DIFFERENCE = [("true positive", TRUE_POSITIVE), ("false positive", FALSE_POSITIVE), ("false negative", FALSE_NEGATIVE)]
WRONG: Colour = (220, 38, 127)
INK, PAPER, GREY = (30, 30, 30), (255, 255, 255), (128, 128, 128)

TILE_SIDE = 700  # longest side of a shown image, in pixels
SMALLEST_SIDE = 240  # smaller images are enlarged, so that texts fit
WORK_SIDE = 4 * TILE_SIDE  # larger images are thinned out before anything is drawn on them
GAP = 10
FILL = 0.35  # opacity of a class over the image
EMPTY_HISTORY = "no epochs to plot: history is empty"


# ---- colours and pixels ----


def class_colours(class_names: Sequence[str]) -> list[Colour | None]:
    """One colour per class; None, which is not drawn, for a class called background."""
    palette = itertools.chain(PALETTE, map(_spread_colour, itertools.count()))
    return [None if name.lower() == "background" else next(palette) for name in class_names]


def _spread_colour(index: int) -> Colour:
    """A further colour: hues by the golden ratio, for data sets of very many classes."""
    red, green, blue = colorsys.hsv_to_rgb(index * 0.618034 % 1, 0.6 + 0.2 * (index % 3), 0.7 + 0.2 * (index % 2))
    return int(255 * red), int(255 * green), int(255 * blue)


def _shown_channels(image: np.ndarray) -> np.ndarray:
    image = image[..., None] if image.ndim == 2 else image
    return image[..., :3] if image.shape[2] >= 3 else image[..., :1]


def display_limits(image: np.ndarray) -> tuple[float, float]:
    """The values of an image that to_display makes 0 and 255: the percentiles 0.5 and 99.5; 8 bit stay unless dark."""
    shown = _shown_channels(image)
    thinned = shown[:: max(1, shown.shape[0] // 1000), :: max(1, shown.shape[1] // 1000)].astype(np.float64)
    finite = thinned[np.isfinite(thinned)]
    low, high = np.percentile(finite, (0.5, 99.5)) if finite.size else (0.0, 0.0)
    return (0.0, 255.0) if image.dtype == np.uint8 and high >= 64 else (low, high)


def to_display(image: np.ndarray, limits: tuple[float, float] | None = None) -> np.ndarray:
    """Show any image as RGB: the first three channels or the first one, stretched unless it is ordinary 8 bit.

    Args:
        image: (H, W) or (H, W, C), any type and range; NaN and infinite values are shown black.
        limits: display_limits of the whole of which this is a part; None: of this image.

    Returns:
        (H, W, 3) uint8. The stretch is the same for all shown channels.
    """
    shown = _shown_channels(image)
    low, high = limits or display_limits(image)
    if image.dtype != np.uint8 or (low, high) != (0, 255):
        scale = 255 / (high - low) if high > low else 0.0
        values = np.nan_to_num(shown.astype(np.float32), nan=low, posinf=low, neginf=low)
        shown = np.clip((values - low) * scale, 0, 255)
    return np.ascontiguousarray(np.broadcast_to(shown.astype(np.uint8), (*shown.shape[:2], 3)))


def overlay(
    image: np.ndarray,
    mask: np.ndarray,
    colours: Sequence[Colour | None] | None = None,
    limits: tuple[float, float] | None = None,
) -> np.ndarray:
    """Draw classes over an image: translucent fill, outline, and hatching where pixels are ignored.

    The outline lies inside the class, with a dark line of one pixel around it: one of the two shows on any picture.

    Args:
        image: (H, W) or (H, W, C), any type and range.
        mask: (H, W) class indices; 255 is ignored.
        colours: one per class index, None leaves the class bare. Without them class 0 is bare.
        limits: as for to_display.

    Returns:
        (H, W, 3) uint8.
    """
    shown = to_display(image, limits)
    if colours is None:
        classes = mask[mask != IGNORE_INDEX]
        colours = class_colours(["background", *map(str, range(int(classes.max(initial=0))))])
    return _paint(shown, mask, colours, line=1 + max(mask.shape) // 1200)


def _paint(shown: np.ndarray, mask: np.ndarray, colours: Sequence[Colour | None], line: int) -> np.ndarray:
    """Paint class indices (H, W) on an RGB picture; line is the width of the outlines in pixels."""
    table = np.zeros((256, 3), np.uint8)
    drawn = np.zeros(256, bool)
    for index, colour in enumerate(colours[:IGNORE_INDEX]):
        if colour is not None:
            table[index], drawn[index] = colour, True
    covered, flat = drawn[mask], table[mask]
    result = _copy_where(shown, cv2.addWeighted(shown, 1 - FILL, flat, FILL, 0), covered)
    result = _copy_where(result, flat, covered & _inner_edge(mask, line))
    around = cv2.dilate(covered.astype(np.uint8), cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))) > covered
    result = _copy_where(result, np.full_like(result, INK), around & (mask != IGNORE_INDEX))
    return _hatch(result, mask == IGNORE_INDEX, line)


def _copy_where(onto: np.ndarray, picture: np.ndarray, where: np.ndarray) -> np.ndarray:
    """A copy of one RGB picture that shows another one where (H, W) is true."""
    return cv2.copyTo(picture, where.astype(np.uint8), onto.copy())


def _inner_edge(mask: np.ndarray, line: int) -> np.ndarray:
    """Pixels of a region within `line` pixels of another region, (H, W) bool. The image's border is no edge."""
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * line + 1, 2 * line + 1))
    labels = mask.astype(np.uint8)
    return cv2.dilate(labels, kernel) != cv2.erode(labels, kernel)


def _hatch(shown: np.ndarray, ignored: np.ndarray, line: int) -> np.ndarray:
    """Grey the ignored pixels and draw diagonals over them."""
    if not ignored.any():
        return shown
    rows, columns = np.ogrid[: ignored.shape[0], : ignored.shape[1]]
    stripes = (rows + columns) % (8 * line) < 2 * line
    greyed = cv2.addWeighted(shown, 0.4, np.full_like(shown, GREY), 0.6, 0)
    result = _copy_where(shown, greyed, ignored)
    return _copy_where(result, np.full_like(shown, 90), ignored & stripes)


def _paint_difference(shown: np.ndarray, mask: np.ndarray, pred: np.ndarray, binary: bool, line: int) -> np.ndarray:
    """Hits, false alarms and misses (binary) or wrong pixels (multi-class) over a greyed picture."""
    grey = cv2.cvtColor(cv2.cvtColor(shown, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    backdrop = cv2.addWeighted(grey, 0.6, np.full_like(grey, 255), 0.15, 0)
    cases: list[tuple[Colour, np.ndarray, float]] = [(WRONG, (pred != mask) & (mask != IGNORE_INDEX), 0.85)]
    if binary:
        cases = [
            (TRUE_POSITIVE, (pred == 1) & (mask == 1), 0.45),
            (FALSE_POSITIVE, (pred == 1) & (mask == 0), 0.9),
            (FALSE_NEGATIVE, (pred == 0) & (mask == 1), 0.9),
        ]
    result = backdrop
    for colour, where, opacity in cases:
        flat = np.full_like(backdrop, colour)
        result = _copy_where(result, cv2.addWeighted(backdrop, 1 - opacity, flat, opacity, 0), where)
    return _hatch(result, mask == IGNORE_INDEX, line)


def _paint_probability(probs: np.ndarray) -> np.ndarray:
    """Probability of the object, or of the likeliest class: black 0, yellow 1. (K, H, W) -> (H, W, 3) uint8."""
    import matplotlib

    level = np.nan_to_num(probs[-1] if len(probs) <= 2 else probs.max(axis=0))
    table = (matplotlib.colormaps["cividis"](np.linspace(0, 1, 256))[:, :3] * 255).astype(np.uint8)
    return table[(np.clip(level, 0, 1) * 255).astype(np.uint8)]


# ---- panels ----


def sample_panel(
    image: np.ndarray,
    mask: np.ndarray | None,
    pred: np.ndarray,
    probs: np.ndarray | None,
    class_names: Sequence[str],
    title: str,
) -> np.ndarray:
    """Compare a prediction with the truth: image, prediction, truth, difference, probability, with a legend.

    Args:
        image: (H, W) or (H, W, C), any type and range.
        mask: (H, W) class indices with 255 ignored; None leaves truth and difference out.
        pred: (H, W) class indices.
        probs: (K, H, W) in [0, 1]; None leaves the probability out.
        class_names: one name per class index; a class called background is not coloured.
        title: one line above the pictures, any letters.

    Returns:
        (H', W', 3) uint8 RGB; each picture is at most 700 pixels long.

    Raises:
        ValueError: the sizes differ.
    """
    for name, size in (("mask", mask), ("pred", pred), ("probs", None if probs is None else probs[0])):
        if size is not None and size.shape != image.shape[:2]:
            raise ValueError(f"{name} is {size.shape} but the image is {image.shape[:2]}: expected equal sizes")
    colours = class_colours(class_names)
    binary = len(class_names) == 2 and colours[0] is None
    frame = _Frame(image.shape[0], image.shape[1])
    shown = to_display(frame.fit(image))
    pred = frame.fit(pred).astype(np.uint8)
    tiles = [("image", shown), ("prediction", _paint(shown, pred, colours, frame.line))]
    used = np.unique(pred)
    if mask is not None:
        mask = frame.fit(mask).astype(np.uint8)
        tiles.append(("truth", _paint(shown, mask, colours, frame.line)))
        tiles.append(("difference", _paint_difference(shown, mask, pred, binary, frame.line)))
        used = np.union1d(used, np.unique(mask))
    if probs is not None:
        tiles.append(("probability (dark 0, yellow 1)", _paint_probability(np.stack([frame.fit(p) for p in probs]))))
    legend = _legend(class_names, colours, used, binary, mask is not None)
    return _compose([(name, frame.finish(tile)) for name, tile in tiles], legend, title)


def picture_row(tiles: Sequence[tuple[str, np.ndarray]], title: str) -> np.ndarray:
    """Set pictures of one size side by side, each below its caption.

    Args:
        tiles: caption and picture (H, W, 3) uint8, as to_display returns it; it is shown as it is.
        title: one line above them, any letters.

    Returns:
        (H', W', 3) uint8 RGB; each picture is at most 700 pixels long, small ones are enlarged.

    Raises:
        ValueError: there are none, or their sizes differ.
    """
    sizes = {picture.shape[:2] for _, picture in tiles}
    if len(sizes) != 1:
        raise ValueError(f"{len(tiles)} pictures have the sizes {sorted(sizes)}: expected one size")
    frame = _Frame(*sizes.pop())
    shown = [(caption, frame.finish(frame.fit(picture))) for caption, picture in tiles]
    return _compose(shown, [], title)


def comparison_row(
    image: np.ndarray, mask: np.ndarray, preds: Mapping[str, np.ndarray], class_names: Sequence[str], title: str
) -> np.ndarray:
    """Set an image beside what several networks make of it: what they hit, what they miss, false alarms.

    Args:
        image: (H, W) or (H, W, C), any type and range.
        mask: (H, W) class indices with 255 ignored.
        preds: (H, W) class indices by captions.
        class_names: one name per class index.
        title: one line above the pictures, any letters.

    Returns:
        (H', W', 3) uint8 RGB; each picture is at most 700 pixels long.

    Raises:
        ValueError: the sizes differ.
    """
    for name, values in (("mask", mask), *preds.items()):
        if values.shape != image.shape[:2]:
            raise ValueError(f"{name} is {values.shape} but the image is {image.shape[:2]}: expected equal sizes")
    binary = len(class_names) == 2 and class_colours(class_names)[0] is None
    frame = _Frame(image.shape[0], image.shape[1])
    shown, mask = to_display(frame.fit(image)), frame.fit(mask).astype(np.uint8)
    tiles = [("image", shown)]
    for caption, pred in preds.items():
        drawn = _paint_difference(shown, mask, frame.fit(pred).astype(np.uint8), binary, frame.line)
        tiles.append((caption, drawn))
    legend = [*(DIFFERENCE if binary else [("wrong", WRONG)])]
    if (mask == IGNORE_INDEX).any():
        legend.append(("ignored", GREY))
    return _compose([(caption, frame.finish(tile)) for caption, tile in tiles], legend, title)


class _Frame:
    """How an image of any size becomes a shown picture: thinned or enlarged, drawn on, then shrunk smoothly."""

    def __init__(self, height: int, width: int) -> None:
        longest = max(height, width)
        self.step = math.ceil(longest / WORK_SIDE)
        self.enlarge = math.ceil(SMALLEST_SIDE / longest)
        shrink = min(1.0, TILE_SIDE / (longest * self.enlarge))
        self.size = max(1, round(height * self.enlarge * shrink)), max(1, round(width * self.enlarge * shrink))
        self.line = max(1, round(1.5 * longest * self.enlarge / self.step / max(self.size)))

    def fit(self, values: np.ndarray) -> np.ndarray:
        """Bring values (H, W, ...) to the size that is drawn on; enlarged pixels stay squares."""
        return values[:: self.step, :: self.step].repeat(self.enlarge, axis=0).repeat(self.enlarge, axis=1)

    def finish(self, picture: np.ndarray) -> np.ndarray:
        """Shrink a drawn picture to the size that is shown."""
        return cv2.resize(picture, self.size[::-1], interpolation=cv2.INTER_AREA)


def _legend(
    class_names: Sequence[str], colours: Sequence[Colour | None], used: np.ndarray, binary: bool, truth: bool
) -> list[tuple[str, Colour]]:
    """Names and colours below the pictures: of the classes that occur, then of the difference."""
    named = enumerate(zip(class_names, colours, strict=True))
    entries = [(name, colour) for index, (name, colour) in named if colour and index in used]
    if truth:
        entries += DIFFERENCE if binary else [("wrong", WRONG)]
    return [*entries, ("ignored", GREY)] if IGNORE_INDEX in used else entries


@lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def _shorten(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Cut the middle out of a text that is wider than width pixels; line breaks become spaces."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    keep = len(text)
    while keep > 2 and font.getlength(f"{text[: keep // 2]}…{text[len(text) - keep // 2 :]}") > width:
        keep -= 2
    return f"{text[: keep // 2]}…{text[len(text) - keep // 2 :]}"


def _compose(tiles: Sequence[tuple[str, np.ndarray]], legend: Sequence[tuple[str, Colour]], title: str) -> np.ndarray:
    """Set title, pictures with captions, and legend on white."""
    height, tile_width = tiles[0][1].shape[:2]
    column = max(tile_width, 110 if len(tiles) < 5 else 210)  # captions fit below very narrow pictures too
    width = GAP + len(tiles) * (column + GAP)
    places, legend_height = _place_legend([name for name, _ in legend], width)
    top = 60
    page = Image.new("RGB", (width, top + height + GAP + legend_height), PAPER)
    pen = ImageDraw.Draw(page)
    pen.text((GAP, 18), _shorten(title, _font(18), width - 2 * GAP), INK, _font(18), anchor="lm")
    for k, (caption, tile) in enumerate(tiles):
        left = GAP + k * (column + GAP)
        pen.text((left, 46), _shorten(caption, _font(14), column), INK, _font(14), anchor="lm")
        page.paste(Image.fromarray(tile), (left, top))
    for (name, colour), (x, y) in zip(legend, places, strict=True):
        y += top + height + GAP
        pen.rectangle((x, y + 2, x + 14, y + 16), fill=colour, outline=INK)
        pen.text((x + 21, y + 9), _shorten(name, _font(14), width - 2 * GAP - 21), INK, _font(14), anchor="lm")
    return np.asarray(page).copy()


def _place_legend(names: Sequence[str], width: int) -> tuple[list[tuple[int, int]], int]:
    """Positions (x, y) of legend entries in rows of the given width, and the height of all rows."""
    places, x, y = [], GAP, 0
    for name in names:
        need = 21 + min(round(_font(14).getlength(name)), width - 2 * GAP - 21)
        if x > GAP and x + need > width - GAP:
            x, y = GAP, y + 24
        places.append((x, y))
        x += need + 24
    return places, y + 24 if names else 0


# ---- curves ----


def learning_curves(history: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Draw loss.png, iou.png and learning_rate.png.

    Args:
        history: rows of metrics.jsonl: {"epoch": 1, "lr": 0.001, "train": {"loss": .., "iou": ..},
            "val": {name of a set: {"loss": .., "iou": ..}}}. Sets and values may be absent in some epochs.
        folder: the run folder; it is made if it is absent.

    Returns:
        The files, each written whole or not at all.

    Raises:
        ValueError: history is empty.
    """
    if not history:
        raise ValueError(EMPTY_HISTORY)
    best = _best_epoch(history)
    sets = {name: row for row in history for name in row.get("val", {})}
    files = []
    for key, label in (("loss", "loss"), ("iou", "IoU")):
        lines = {"train": _points(history, ("train", key))}
        lines |= {name: _points(history, ("val", name, key)) for name in sets}
        files.append(_draw_curves(lines, label, best, folder / f"{key}.png"))
    rates = {"learning rate": _points(history, ("lr",))}
    return [*files, _draw_curves(rates, "learning rate", best, folder / "learning_rate.png")]


def pretraining_curves(history: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Draw loss.png, learning_rate.png and effective_rank.png of a pretraining into its run folder.

    Args:
        history: rows of metrics.jsonl: {"epoch": 1, "lr": 0.001, "train": {"loss": ..}, "watch": {"rank": ..}}.

    Raises:
        ValueError: history is empty.
    """
    if not history:
        raise ValueError(EMPTY_HISTORY)
    lines = {"loss": ("train", "loss"), "learning rate": ("lr",), "effective rank": ("watch", "rank")}
    return [
        _draw_curves({label: _points(history, keys)}, label, 0, folder / f"{label.replace(' ', '_')}.png")
        for label, keys in lines.items()
    ]


def _points(history: Sequence[dict[str, Any]], keys: Sequence[str]) -> list[tuple[int, float]]:
    """(epoch, value) of one number over the epochs, where it was measured and is finite."""
    points = []
    for row in history:
        value: Any = row
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None and math.isfinite(value):
            points.append((int(row["epoch"]), float(value)))
    return points


def _best_epoch(history: Sequence[dict[str, Any]]) -> int:
    """The first epoch with the highest IoU of what decides; 0 when unknown.

    That is the weighted mean of the validation sets, else the first of them, else the training set.
    """
    sets = [name for row in history for name in row.get("val", {})]
    first = ("val", sets[0], "iou") if sets else ("train", "iou")
    points = _points(history, ("score", "iou")) or _points(history, first)
    return max(points, key=lambda point: point[1])[0] if points else 0


def _draw_curves(lines: dict[str, list[tuple[int, float]]], label: str, best: int, path: Path) -> Path:
    """Draw named curves over epochs into a PNG; the best epoch is marked on each."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.5), dpi=110)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0.1, 0.11, 0.87, 0.81))
    shown = {name: points for name, points in lines.items() if points}
    every = [epoch for points in shown.values() for epoch, _ in points]
    for index, (name, points) in enumerate(shown.items()):
        colour = "0.45" if name == "train" else np.array(PALETTE[(4, 5, 2, 1, 6)[index % 5]]) / 255
        epochs, values = zip(*points, strict=True)
        at_best = dict(points).get(best) if len(lines) > 1 else None
        text = name if at_best is None else f"{name}: {at_best:.3f} at epoch {best}"
        axes.plot(epochs, values, color=colour, label=text, linewidth=1.8, marker="." if len(points) < 40 else "")
        if at_best is not None and name != "train":
            axes.plot([best], [at_best], color=colour, marker="o", markersize=9, fillstyle="none", markeredgewidth=2)
    if len(lines) > 1:
        axes.axvline(best, color="0.7", linestyle=":", zorder=0)
    axes.set(xlabel="epoch", ylabel=label, title=label[0].upper() + label[1:] + " per epoch")
    axes.set_xlim(min(every, default=1) - 0.5, max(every, default=1) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if len(shown) > 1:
        axes.legend(frameon=False)
    memory = io.BytesIO()
    canvas.print_png(memory)
    with atomic_write(path) as file:
        file.write(memory.getvalue())
    return path


def rate_curve(
    rates: Sequence[float],
    losses: Sequence[float],
    smoothed: Sequence[float],
    marks: Mapping[str, float | None],
    path: Path,
) -> Path:
    """Draw the loss over the learning rates that a range test tried.

    Args:
        losses: of each step. smoothed: their moving average, which the heights of the picture belong to.
        marks: rates to mark, by what they are; None is left out.
        path: PNG, written whole or not at all.

    Raises:
        ValueError: there are no steps.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not rates:
        raise ValueError("no steps to plot: rates are empty")
    figure = Figure(figsize=(8, 4.5), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(rates, losses, color="0.75", linewidth=1, label="loss of a step")
    axes.plot(rates, smoothed, color=np.array(PALETTE[4]) / 255, linewidth=1.8, label="smoothed")
    for index, (name, rate) in enumerate(marks.items()):
        if rate is not None:
            colour = np.array(PALETTE[(5, 2)[index % 2]]) / 255
            axes.axvline(rate, color=colour, linestyle="--", label=f"{name}: {rate:.2g}")
    low, high = min(smoothed), max(smoothed[: max(1, len(smoothed) - 3)])
    room = max(high - low, 1e-6) * 0.15
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss", title="Loss while the learning rate rises")
    axes.set_ylim(low - room, high + room)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    memory = io.BytesIO()
    canvas.print_png(memory)
    with atomic_write(path) as file:
        file.write(memory.getvalue())
    return path


def time_curves(rows: Sequence[Mapping[str, Any]], title: str, unit: str, path: Path) -> Path:
    """Draw how many objects a video shows over time, and how large they are.

    Args:
        rows: one for each frame, with seconds, objects, and diameter_median, diameter_p10 and diameter_p90 (None where
            there is no object).
        title: any letters.
        unit: of the diameters.
        path: PNG, written whole or not at all.

    Raises:
        ValueError: there are no rows.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    if not rows:
        raise ValueError("no frames to plot: rows are empty")
    figure = Figure(figsize=(8, 6), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True)
    seconds = [float(row["seconds"]) for row in rows]
    names = ("objects", "diameter_median", "diameter_p10", "diameter_p90")
    columns = {name: [math.nan if row[name] is None else float(row[name]) for row in rows] for name in names}
    blue, orange = (np.array(PALETTE[index]) / 255 for index in (4, 5))
    marker = "." if len(rows) < 40 else ""
    above.plot(seconds, columns["objects"], color=blue, linewidth=1.6, marker=marker)
    below.fill_between(
        seconds, columns["diameter_p10"], columns["diameter_p90"], color=orange, alpha=0.2, label="10 to 90 %"
    )
    below.plot(seconds, columns["diameter_median"], color=orange, linewidth=1.6, marker=marker, label="median")
    above.set_title(title, parse_math=False)
    above.set(ylabel="objects")
    above.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    below.set(xlabel="seconds", ylabel=f"equivalent diameter, {unit}")
    below.legend(frameon=False)
    for axes in (above, below):
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    memory = io.BytesIO()
    canvas.print_png(memory)
    with atomic_write(path) as file:
        file.write(memory.getvalue())
    return path
