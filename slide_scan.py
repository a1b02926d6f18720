"""Look at a slide without reading all of it: statistics from windows over tissue, labels from the whole mask."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace

import numpy as np

from facts import ImageFacts, MaskFacts, count_labels, moments
from image_headers import ImageError
from pairing import DatasetError, Pair
from slide_index import draw_corner, draw_tissue, slide_tissue
from slide_windows import SlideOptions, SlidePair, is_slide_image
from tissue import Tissue

SAMPLED_WINDOWS = 64  # of a slide, for its statistics
SAMPLED_SIDE = 256  # pixels of the training scale
FINDINGS_SHOWN = 5  # of one mask
MISSED = 0.01  # part of the annotated pixels outside the tissue that is warned about
_ERRORS = (ImageError, DatasetError, OSError)


def scan_slide(pair: Pair, options: SlideOptions, steps: Sequence[str]) -> dict[str, object]:
    """Facts of a slide as scan.scan_pairs keeps them: `layers`, `mask`, `roi` and `sampled`."""
    mask = MaskFacts() if pair.mask else None
    roi = MaskFacts() if pair.roi else None
    layers = [ImageFacts() for _ in pair.layers]
    try:
        if steps:
            raise ImageError(
                f"{pair.image} is read by windows, and --preprocess {' '.join(steps)} needs whole images; leave it out"
            )
        with SlidePair(pair, options) as slide:
            size = slide.height, slide.width
            for part in (*layers, mask, roi):
                if part is not None:
                    part.size = size
            tissue = slide_tissue(slide, slide.options.tissue)
            sampled = _scan_pixels(slide, tissue, layers)
            if mask is not None:
                _scan_mask(slide, tissue, mask)
            if roi is not None and slide.roi is not None:
                roi.findings = _shortened(slide.roi.findings)
            if mask is not None:
                mask.findings += _shortened(slide.damage)
    except _ERRORS as error:
        sampled = ""
        for part in (layers[0], mask):
            if part is not None:
                part.error = str(error)  # one message for both, for one cannot be looked at without the other
    return {
        "layers": [asdict(layer) for layer in layers],
        "mask": mask and asdict(mask),
        "roi": roi and asdict(roi),
        "sampled": sampled,
    }


def _scan_pixels(slide: SlidePair, tissue: Tissue | None, layers: Sequence[ImageFacts]) -> str:
    """Fill in the facts of the layers from windows, the same each time; say what was looked at."""
    name = hashlib.sha256(slide.pair.name.encode()).digest()
    rng = np.random.default_rng(int.from_bytes(name[:8], "little"))
    side = min(SAMPLED_SIDE, slide.height), min(SAMPLED_SIDE, slide.width)
    everything = side[0] * side[1] * SAMPLED_WINDOWS >= slide.height * slide.width
    corners = _tiling_corners(slide, side) if everything else _random_corners(slide, tissue, side, rng)
    pixels: list[np.ndarray] = []
    for top, left in corners:
        window = top, left, min(side[0], slide.height - top), min(side[1], slide.width - left)
        values = slide.pixels(*window)
        known = [grid.valid(*window) for grid in slide.grids]
        holds = np.all([part for part in known if part is not None] or [np.ones(window[2:], bool)], axis=0)
        pixels.append(values[holds])
    found = np.concatenate(pixels)  # (P, C)
    first = 0
    for layer, grid, source in zip(layers, slide.grids, slide.pair.layers, strict=True):
        layer.channels = grid.channels if layer is layers[0] else 1
        layer.dtype = str(grid.dtype)
        own = found[:, first : first + layer.channels].astype(grid.dtype, copy=False)
        first += layer.channels
        layer.pixels = len(own)
        if len(own):
            if not np.isfinite(own).all():
                raise ImageError(f"{source} holds NaN or infinity; expected numbers: declare them as nodata")
            layer.low, layer.high = float(own.min()), float(own.max())
            layer.means, layer.spreads = moments(own)
    if everything and not slide.options.rescales:
        return ""
    what = "all pixels" if everything else f"{SAMPLED_WINDOWS} windows of {SAMPLED_SIDE} x {SAMPLED_SIDE} pixels"
    return f"{what} of each slide ({slide.options.text()})"


def _tiling_corners(slide: SlidePair, side: tuple[int, int]) -> list[tuple[int, int]]:
    return [(top, left) for top in range(0, slide.height, side[0]) for left in range(0, slide.width, side[1])]


def _random_corners(
    slide: SlidePair, tissue: Tissue | None, side: tuple[int, int], rng: np.random.Generator
) -> list[tuple[int, int]]:
    size = slide.height, slide.width
    return sorted(draw_corner(size, side, draw_tissue(tissue, rng), rng) for _ in range(SAMPLED_WINDOWS))


def _scan_mask(slide: SlidePair, tissue: Tissue | None, facts: MaskFacts) -> None:
    """Count the labels of the whole mask at the training scale; an unreadable one becomes an error."""
    assert slide.mask is not None
    counts: Counter[int] = Counter()
    annotated = missed = 0
    try:
        for top, values, outside in slide.bands():
            counted = values if outside is None else values[~outside]
            counts.update({value: count for value, count in count_labels(counted)})
            if tissue is not None:
                inside = values != 0
                annotated += int(inside.sum())
                missed += int((inside & ~tissue.rows(top, len(values))).sum())
    except _ERRORS as error:
        facts.error = str(error)
        return
    facts.labels = [[value, count] for value, count in sorted(counts.items())]
    facts.names = slide.mask.names
    facts.findings = _shortened(slide.mask.findings)
    if annotated and missed > MISSED * annotated:
        facts.findings.append(
            f"{slide.pair.mask}: {missed / annotated:.1%} of what is annotated for {slide.pair.name} lies outside the "
            f"tissue ({slide.options.tissue} rule), where nothing is predicted: look at it, or give --tissue none"
        )


def _shortened(findings: Sequence[str]) -> list[str]:
    more = len(findings) - FINDINGS_SHOWN
    return [*findings[:FINDINGS_SHOWN], *([f"... and {more} more of that file"] if more > 0 else [])]


def choose_tissue(pairs: Sequence[Pair], options: SlideOptions, rule: str) -> tuple[SlideOptions, str]:
    """Settle which tissue rule a run keeps to, and say so.

    Args:
        pairs: the training split; slides are looked at.
        rule: a rule, or "auto": saturation when all slides are RGB, say how many micrometres a pixel is, lie on no map
            and at least one shows colour; else none.
    """
    pairs = [pair for pair in pairs if is_slide_image(pair.image, options)]
    if rule != "auto":
        effect = "" if pairs else ", which is not looked for: no image is a slide"
        return replace(options, tissue=rule), f"tissue: rule {rule}{effect}"
    if not pairs:
        return options, ""
    shares = []
    for pair in pairs:
        try:
            with SlidePair(Pair(pair.name, pair.image), options) as slide:
                if slide.slide.channels != 3 or slide.slide.mpp is None or slide.slide.geo is not None:
                    return options, "tissue: not looked for, windows come from whole slides (--tissue looks for it)"
                tissue = slide_tissue(slide, "saturation")
        except _ERRORS:  # it is named when its turn comes
            continue
        shares.append(tissue.share if tissue else 1.0)
    if not any(shares):
        return options, "tissue: none found by its colour, windows come from whole slides (--tissue otsu looks closer)"
    note = (
        f"tissue: {np.mean(shares):.0%} of the slides by the saturation rule; windows lie in it and nothing is "
        "predicted outside it (--tissue none takes all)"
    )
    return replace(options, tissue="saturation"), note
