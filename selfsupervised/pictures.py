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

from plots import picture_row, to_display
from selfsupervised.encoders import feature_maps

STRIDE = 4  # of the finest features that are shown
ROWS = 1024  # places that the components are computed from
BATCH = 8
SHOWN, QUERIES, NEIGHBOURS = 6, 4, 5
TAIL = 0.02  # share of the values at each end that the colours leave out
GREY = 127
ALIKE = 1e-6  # of the largest deviation: components below it are noise of rounding


class FeaturePictures:
    """Draws the same windows again and again, with colours that stay from one time to the next.

    Args:
        mean, std: of the channels, in raw units; dtype: of the images. They undo the normalisation.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], *, dtype: str = "uint8") -> None:
        self.mean, self.std = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (mean, std))
        self.dtype = np.dtype(dtype)
        self.before: np.ndarray | None = None  # components that were shown last

    def __call__(self, encoder: nn.Module, windows: Tensor, names: Sequence[str]) -> dict[str, list[np.ndarray]]:
        """Pictures by tag.

        Args:
            encoder: in evaluation mode.
            windows: (n, C, S, S), normalised.
            names: of the images that the windows are from.
        """
        chosen = spread_out(names, SHOWN)
        shown = [self.displayed(windows[place]) for place in chosen]
        components = principal_components(dense_features(encoder, windows[chosen]))
        components = align(components, brightness(shown, components.shape[1:3]), self.before)
        self.before = components
        colours = [enlarge(picture, shown[0].shape[:2]) for picture in to_colours(components)]
        tops = [(names[place], picture) for place, picture in zip(chosen, shown, strict=True)]
        sheet = stack_rows(
            picture_row(tops, "windows"),
            picture_row([(names[place], c) for place, c in zip(chosen, colours, strict=True)], CAPTION),
        )
        pictures = {"Dense features": [sheet]}
        if len(windows) > 1:
            pictures["Nearest neighbours"] = [self.neighbours(encoder, windows, names)]
        return pictures

    def displayed(self, window: Tensor) -> np.ndarray:
        """A window (C, S, S) in raw units, as RGB (S, S, 3) uint8."""
        values = (window.cpu() * self.std + self.mean).permute(1, 2, 0).numpy()
        if self.dtype.kind == "u":
            values = np.clip(values.round(), 0, np.iinfo(self.dtype).max).astype(self.dtype)
        return to_display(values)

    def neighbours(self, encoder: nn.Module, windows: Tensor, names: Sequence[str]) -> np.ndarray:
        """A sheet: some windows, each beside those of other images that are most alike to the encoder."""
        alike = similarities(encoder, windows)
        queries, rows = spread_out(names, QUERIES), []
        for query in queries:
            found = nearest(alike[query], query, names, NEIGHBOURS)
            tiles = [(names[query], self.displayed(windows[query]))]
            tiles += [(f"{alike[query, place]:.2f}  {names[place]}", self.displayed(windows[place])) for place in found]
            rows.append(picture_row(tiles, "a window, and the nearest of other images with their cosine similarities"))
        return stack_rows(*rows)


CAPTION = "the first three principal components of their features, as red, green and blue"


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
def dense_features(encoder: nn.Module, images: Tensor) -> Tensor:
    """Features of images (n, C, H, W) at all strides from STRIDE on, enlarged to the finest of these: (n, D, h, w).

    Each scale is divided by its own deviation, so that a wide one does not drown the others.
    """
    device, parts = next(encoder.parameters()).device, []
    for batch in images.split(BATCH):
        maps = [values.float().cpu() for values in feature_maps(encoder, batch.to(device))]
        coarse = [values for values in maps if values.shape[-1] * STRIDE <= images.shape[-1]] or maps[-1:]
        size = max((values.shape[-2:] for values in coarse), key=lambda shape: shape[0] * shape[1])
        parts.append([functional.interpolate(values, size, mode="bilinear", align_corners=False) for values in coarse])
    scales = [torch.cat(values) for values in zip(*parts, strict=True)]
    return torch.cat([values / values.std().clamp(min=1e-6) for values in scales], dim=1)


def principal_components(features: Tensor) -> np.ndarray:
    """The first three principal components of features (n, D, h, w) at all places: (n, h, w, 3) float32.

    By falling variance, in units of the first one's deviation; those that do not vary, and that fewer than three
    features do not have, are 0. Their signs mean nothing, see align.
    """
    count, depth, height, width = features.shape
    places = torch.nan_to_num(features).permute(0, 2, 3, 1).reshape(-1, depth).double()
    places = places - places.mean(dim=0)
    some = places[:: max(1, -(-len(places) // ROWS))]
    axes = torch.linalg.svd(some, full_matrices=False).Vh[:3]  # (up to 3, D)
    found = places @ axes.T
    deviations = found.std(dim=0, correction=0)
    largest = float(deviations.max())
    values = np.zeros((len(places), 3), np.float32)
    if largest > 0:
        kept = [place for place, deviation in enumerate(deviations.tolist()) if deviation > ALIKE * largest]
        values[:, : len(kept)] = (found[:, kept] / largest).numpy()
    return values.reshape(count, height, width, 3)


def align(components: np.ndarray, bright: np.ndarray, before: np.ndarray | None) -> np.ndarray:
    """Components with signs, and an order, that last time's colours go on with.

    Args:
        components: (n, h, w, 3). bright: (n, h, w), how bright the images are there. before: components of the same
            places that were shown last; None, or of another size: each sign is chosen so that bright places are high.
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
    """Components (n, h, w, 3) as red, green and blue, uint8; each uses the whole range, a constant one is grey."""
    low, high = np.quantile(components, (TAIL, 1 - TAIL), axis=(0, 1, 2))
    varies = high > low
    scale = np.where(varies, 255 / np.where(varies, high - low, 1), 0)
    colours = np.clip((components - low) * scale, 0, 255)
    return np.where(varies, colours, GREY).round().astype(np.uint8)


def brightness(pictures: Sequence[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """How bright pictures (H, W, 3) are, as (n, h, w)."""
    grey = torch.from_numpy(np.stack(pictures)).float().mean(dim=3)[:, None]
    return functional.adaptive_avg_pool2d(grey, size)[:, 0].numpy()


def enlarge(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
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
