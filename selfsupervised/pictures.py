"""What an encoder sees, as pictures: its dense features as colours, and windows that look alike to it.

Example:
    pictures = FeaturePictures(statistics.mean, statistics.std, dtype="uint8")
    pictures(encoder, windows, names)  # {"Dense features": [...], "Nearest neighbours": [...]}
"""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from model import BUILD_ERRORS
from plots import display_limits, picture_row, to_display
from selfsupervised.encoders import feature_maps
from selfsupervised.interface import Method

STRIDE = 4  # of the finest features that are shown
BORDER = 32  # pixels of reflection around an image
ROWS = 1024  # places that the components are computed from
BATCH = 8
SHOWN, QUERIES, NEIGHBOURS = 6, 4, 5
FAINT = 0.2
TAIL = 0.02  # share of the values at each end that the colours leave out
GREY = 127
CAPTION = "the first three principal components of the features of each, as red, green and blue"
ALIKE = 1e-6  # of the largest deviation: components below it are noise of rounding


class FeaturePictures:
    """Draws the same windows again and again, with colours that stay from one time to the next.

    Args:
        mean, std: of the channels, in raw units; dtype: of the images. They undo the normalisation.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], *, dtype: str = "uint8") -> None:
        self.mean, self.std = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (mean, std))
        self.dtype = np.dtype(dtype)
        self.before: dict[int, np.ndarray] = {}  # components that were shown last

    def __call__(self, encoder: nn.Module, windows: Tensor, names: Sequence[str]) -> dict[str, list[np.ndarray]]:
        """Pictures by tag.

        Args:
            encoder: in evaluation mode.
            windows: (n, C, S, S), normalised.
            names: of the images that the windows are from.
        """
        chosen = spread_out(names, SHOWN)
        shown = self.displayed(windows)
        tops = [(names[place], shown[place]) for place in chosen]
        below = []
        for place in chosen:
            components = principal_components(dense_features(encoder, windows[place]))
            components = align(
                components, brightness(shown[place], (len(components), components.shape[1])), self.before.get(place)
            )
            self.before[place] = components
            below.append((names[place], enlarge(to_colours(components), windows.shape[-2:])))
        pictures = {"Dense features": [stack_rows(picture_row(tops, "windows"), picture_row(below, CAPTION))]}
        if len(windows) > 1:
            pictures["Nearest neighbours"] = [neighbours(similarities(encoder, windows), shown, names)]
        return pictures

    def completions(self, method: Method, windows: Tensor, names: Sequence[str]) -> dict[str, list[np.ndarray]]:
        """The same windows as a method completes them, row by row; nothing of a method that completes none.

        Args:
            method: see Method.complete. windows, names: as above.
        """
        chosen = spread_out(names, SHOWN)
        images = windows[chosen]
        made = method.complete(images.to(next(method.parameters()).device))
        if not made:
            return {}
        every, rows = self.limits(self.raw(windows)), []
        limits = [every[place] for place in chosen]
        for title, values in {"windows": images, **made}.items():
            shown = [to_display(window, each) for window, each in zip(self.raw(values), limits, strict=True)]
            rows.append(picture_row([(names[place], tile) for place, tile in zip(chosen, shown, strict=True)], title))
        return {"Completed windows": [stack_rows(*rows)]}

    def displayed(self, windows: Tensor) -> list[np.ndarray]:
        """Windows (n, C, S, S) in raw units, as RGB (S, S, 3) uint8.

        Each is stretched by itself, dark ones no further than to FAINT of what all of them need together: a window
        without anything in it stays dark, and does not show its noise.
        """
        values = self.raw(windows)
        return [to_display(window, each) for window, each in zip(values, self.limits(values), strict=True)]

    def limits(self, values: np.ndarray) -> list[tuple[float, float]]:
        """What of the values of each window (n, S, S, C) becomes black and white, see displayed."""
        low, high = display_limits(values.reshape(len(values), -1, values.shape[-1]))
        own = [display_limits(window) for window in values]
        return [(least, max(most, least + FAINT * (high - low))) for least, most in own]

    def raw(self, windows: Tensor) -> np.ndarray:
        """Windows (n, C, S, S) in raw units and in the type of the images, (n, S, S, C)."""
        values: np.ndarray = (windows.cpu() * self.std + self.mean).permute(0, 2, 3, 1).numpy()
        if self.dtype.kind == "u":
            values = np.clip(values.round(), 0, np.iinfo(self.dtype).max).astype(self.dtype)
        return values


def spread_out(names: Sequence[str], count: int) -> list[int]:
    """Places of windows of different images as far as possible, from all over the list."""
    firsts = [place for place, name in enumerate(names) if name not in names[:place]]
    rest = [place for place in range(len(names)) if place not in set(firsts)]
    pool = firsts if len(firsts) >= count else firsts + rest[: count - len(firsts)]
    picked = np.linspace(0, len(pool) - 1, min(count, len(pool))).round().astype(int)
    return [pool[place] for place in picked.tolist()]


def stack_rows(*rows: np.ndarray) -> np.ndarray:
    """Pictures (H, W, 3) below each other, on white."""
    width = max(row.shape[1] for row in rows)
    padded = [np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
    return np.concatenate(padded)


# ----------------------------------------------------------------------------------------------------------------------
# Principal components


@torch.no_grad()
def dense_features(encoder: nn.Module, image: Tensor) -> Tensor:
    """Features of an image (C, H, W) at all strides from STRIDE on, enlarged to the finest of these: (D, h, w).

    Each scale is divided by its own deviation, so that a wide one does not drown the others. Around the image its
    reflection is shown to the encoder, which would answer to a black border; one of a single size sees it as it is.
    """
    device, size = next(encoder.parameters()).device, image.shape[1:]
    mode = "reflect" if min(size) > BORDER else "replicate"
    try:
        maps = feature_maps(encoder, functional.pad(image[None], (BORDER,) * 4, mode=mode).to(device))
        maps = [_without_border(values, size) for values in maps]
    except BUILD_ERRORS:
        maps = feature_maps(encoder, image[None].to(device))
    maps = [values.float().cpu() for values in maps]
    coarse = [values for values in maps if values.shape[-1] * STRIDE <= size[1]] or maps[-1:]
    finest = max((values.shape[-2:] for values in coarse), key=lambda shape: shape[0] * shape[1])
    brought = [functional.interpolate(values, finest, mode="bilinear", align_corners=False)[0] for values in coarse]
    return torch.cat([values / values.std().clamp(min=1e-6) for values in brought])


def _without_border(values: Tensor, size: Sequence[int]) -> Tensor:
    """The part (1, C, h, w) of the features of a bordered image that belongs to the image of `size` (H, W)."""
    cuts = []
    for length, side in zip(values.shape[-2:], size, strict=True):
        inside = max(1, round(length * side / (side + 2 * BORDER)))
        first = (length - inside) // 2
        cuts.append(slice(first, first + inside))
    return values[..., cuts[0], cuts[1]]


def principal_components(features: Tensor) -> np.ndarray:
    """The first three principal components of features (D, h, w) over their places: (h, w, 3) float32.

    By falling variance, in units of the first one's deviation; those that do not vary, and that fewer than three
    features do not have, are 0. Their signs mean nothing, see align.
    """
    depth, height, width = features.shape
    places = torch.nan_to_num(features).double().flatten(1).T
    places = places - places.mean(dim=0)
    some = places[:: max(1, -(-len(places) // ROWS))]
    axes = torch.linalg.svd(some, full_matrices=False).Vh[:3]  # (up to 3, D)
    deviations = (some @ axes.T).square().mean(dim=0).sqrt()
    largest = float(deviations.max())
    values = np.zeros((height, width, 3), np.float32)
    if largest > ALIKE * float(features.nan_to_num().abs().max()):
        kept = axes[deviations > ALIKE * largest]
        found = places @ kept.T / largest
        values[..., : len(kept)] = found.reshape(height, width, -1).numpy()
    return values


def align(components: np.ndarray, bright: np.ndarray, before: np.ndarray | None) -> np.ndarray:
    """Components with signs, and in an order, that go on with the colours of last time.

    Args:
        components: (h, w, 3). bright: (h, w), how bright the image is there. before: components of the same places that
            were shown last; None, or of another size: each sign is chosen so that bright places are high.
    """
    flat = components.reshape(-1, 3)
    if before is None or before.shape != components.shape:
        signs = [1 if _correlation(column, bright.ravel()) >= 0 else -1 for column in flat.T]
        return components * np.array(signs, np.float32)
    then = before.reshape(-1, 3)
    table = np.array([[_correlation(now, old) for now in flat.T] for old in then.T])  # (old, now)
    order = max(
        itertools.permutations(range(3)), key=lambda order: sum(abs(table[old, now]) for old, now in enumerate(order))
    )
    signs = [1 if table[old, now] >= 0 else -1 for old, now in enumerate(order)]
    return components[..., list(order)] * np.array(signs, np.float32)


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Of two vectors; 0 where one is constant."""
    one, other = (values - values.mean(dtype=np.float64) for values in (one, other))
    size = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(one @ other) / size if size > 0 else 0.0


def to_colours(components: np.ndarray) -> np.ndarray:
    """Components (h, w, 3) as red, green and blue, uint8; each uses the whole range, a constant one is grey."""
    low, high = np.quantile(components, (TAIL, 1 - TAIL), axis=(0, 1))
    varies = high > low
    scale = np.where(varies, 255 / np.where(varies, high - low, 1), 0)
    colours = np.clip((components - low) * scale, 0, 255)
    return np.where(varies, colours, GREY).round().astype(np.uint8)


def brightness(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """How bright a picture (H, W, 3) is, as (h, w)."""
    grey = torch.tensor(picture).float().mean(dim=2)[None, None]
    return functional.adaptive_avg_pool2d(grey, size)[0, 0].numpy()


def enlarge(picture: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """A picture (h, w, 3) at a larger size, its pixels as squares."""
    rows = np.arange(size[0]) * picture.shape[0] // size[0]
    columns = np.arange(size[1]) * picture.shape[1] // size[1]
    return picture[rows][:, columns]


# ----------------------------------------------------------------------------------------------------------------------
# Neighbours


@torch.no_grad()
def similarities(encoder: nn.Module, windows: Tensor) -> np.ndarray:
    """Cosine similarities (n, n) of the coarsest features of windows, averaged over places, without their mean.

    Without the mean, for what all windows have in common tells none from another.
    """
    device = next(encoder.parameters()).device
    pooled = [feature_maps(encoder, batch.to(device))[-1].float().mean(dim=(2, 3)) for batch in windows.split(BATCH)]
    features = torch.nan_to_num(torch.cat(pooled)).double().cpu()
    features = functional.normalize(features - features.mean(dim=0), dim=1)
    return (features @ features.T).numpy()


def nearest(alike: np.ndarray, query: int, names: Sequence[str], count: int) -> list[int]:
    """Windows most alike to a query, by falling similarity; of other images where there are any."""
    order = [place for place in np.argsort(-alike, kind="stable").tolist() if place != query]
    others = [place for place in order if names[place] != names[query]]
    return (others or order)[:count]


def neighbours(alike: np.ndarray, shown: Sequence[np.ndarray], names: Sequence[str]) -> np.ndarray:
    """A sheet: some windows, each beside those of other images that are most alike to the encoder.

    Args:
        alike: similarities (n, n). shown: the windows as RGB. names: of their images.
    """
    rows = []
    for query in spread_out(names, QUERIES):
        found = nearest(alike[query], query, names, NEIGHBOURS)
        tiles = [("the window", shown[query])]
        tiles += [(f"{alike[query, place]:.2f}  {names[place]}", shown[place]) for place in found]
        rows.append(picture_row(tiles, f"nearest to a window of {names[query]}, by cosine similarity"))
    return stack_rows(*rows)
