"""What can be set about the watershed engine, its presets and its flags. Imports nothing heavy."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import cli

PRESET_NAMES = (
    "auto",
    "bubbles",
    "nuclei",
    "grains",
    "froth",
    "fluorescence",
    "histology",
    "cytology",
    "ctci",
    "ctci-code",
)


def _sigmas(text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(word) for word in text.replace(",", " ").split())
    except ValueError:
        found = (-1.0,)
    if any(not 0 < sigma < 1e6 for sigma in found if found != (0.0,)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected widths in pixels with commas between, such as 15,80,250")
    return () if found == (0.0,) else found


def _holes(text: str) -> int:
    value = int(text) if text.lstrip("-").isdigit() else -2
    if value < -1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected pixels, 0 for none or -1 for all holes")
    return value


def _flag(
    text: str, kind: Callable[[str], Any] | None = None, metavar: str = "X", *, choices: tuple[str, ...] = ()
) -> Any:
    """A field that is also a flag: automatic unless given."""
    what = {"choices": choices} if choices else {"type": kind, "metavar": metavar}
    return field(default=None, metadata={"help": text, **what})


@dataclass(frozen=True)
class WatershedOptions:
    """Settings of the watershed engine, in the order in which they are used; None: from the preset and the picture.

    The types are those after annotation.watershed.choose_options, which leaves no None.
    Lengths and areas are in pixels, brightness in shares of the stretched range: 0 black, 1 white, dark objects turned
    bright. The flag of a field is --ws- and its name, that of `preset` is --preset.
    """

    preset: str = "auto"
    # one channel, clean and stretched
    channel: str = _flag(
        "channel to look at; default: the one whose histogram parts best", choices=("grey", "red", "green", "blue")
    )
    objects: str = _flag(
        "what objects are: bright or dark areas, or bright rims around anything", choices=("bright", "dark", "rims")
    )
    retinex: tuple[float, ...] = _flag("sigmas of (multi-scale) retinex against uneven light; 0: none", _sigmas)
    bilateral: int = _flag("diameter of a bilateral filter; 0: none", cli.natural, "N")
    bilateral_colour: float = _flag("its sigma of brightness, in spreads of the picture", cli.positive_float)
    bilateral_space: float = _flag("its sigma of distance", cli.positive_float)
    reconstruct: int = _flag("remove spots below N pixels by reconstruction; 0: none", cli.natural, "N")
    blur: float = _flag("sigma of a Gaussian blur", cli.not_negative)
    black: float = _flag("value that becomes 0; default: the percentile --ws-stretch below", float)
    white: float = _flag("value that becomes 1; default: the percentile --ws-stretch from above", float)
    stretch: float = _flag("percentage of pixels that may be beyond white or black", cli.not_negative)
    size: float = _flag("diameter of the typical object; default: measured", cli.positive_float)
    # a mask
    threshold: str = _flag("rule for the threshold of the picture", choices=("otsu", "weighted", "none"))
    gamma: float = _flag(
        "brightness is raised to this power before that rule; default: by polarity", cli.positive_float
    )
    level: float = _flag("the threshold itself, from 0 to 1; default: by the rule", cli.share)
    lower: float = _flag("times this is the threshold that the rule gives", cli.positive_float)
    ground: float = _flag("brightness of what is no object; default: the median below the threshold", cli.not_negative)
    relative: float = _flag("and above this share of the brightest nearby; 0: none", cli.share)
    local: float = _flag("objects are above the mean of a window of X sizes; 0: none", cli.not_negative)
    opening: int = _flag("smooth the mask by an opening N pixels wide", cli.natural, "N")
    holes: int = _flag("fill holes of at most N pixels; -1 fills all", _holes, "N")
    markers: str = _flag("objects to part: all, or the big or the small ones", choices=("all", "big", "small"))
    # objects
    landscape: str = _flag("what is flooded: distance or brightness", choices=("distance", "intensity"))
    smooth: float = _flag("sigma of its blur", cli.not_negative)
    neck: float = _flag("objects part where it falls below this share of the lower peak", cli.share)
    depth: float = _flag("and by so much (the h of h-maxima)", cli.not_negative)
    spacing: int = _flag("instead of both: peaks are at least N pixels apart", cli.natural, "N")
    core: float = _flag("cut each object at this share of its own height; 0: not", cli.share)
    passes: int = _flag("how often objects are cut and parted again", cli.natural, "N")
    extent: float = _flag("share of its height down to which an object reaches in the end", cli.share)
    grow: int = _flag("grow objects by N pixels", cli.natural, "N")
    # rules
    contrast: float = _flag("drop what rises over its surroundings by less of its height", cli.share)
    ellipse: float = _flag("and by so much more times the share that is missing to an ellipse", cli.not_negative)
    around: float = _flag("share of the surroundings that it has to rise over", cli.share)
    min_area: int = _flag("drop objects of fewer pixels", cli.natural, "N")
    max_area: int = _flag("drop objects of more pixels", cli.positive_int, "N")
    border: Literal["keep", "drop"] = _flag("objects at the frame of the picture", choices=("keep", "drop"))


# Tried by --tune: what differs most between kinds of pictures. Names of flags, see annotation.tuning.
SPACE: dict[str, list[Any] | tuple[float, float, str]] = {
    "ws_objects": ["bright", "dark", "rims"],
    "ws_blur": (0.25, 2.5, "log"),
    "ws_opening": [0, 3, 5],
    "ws_level": (0.05, 0.6, "log"),
    "ws_relative": (0.0, 0.6, "linear"),
    "ws_neck": (0.6, 0.97, "linear"),
    "ws_core": (0.2, 0.7, "linear"),
    "ws_extent": (0.1, 0.6, "linear"),
    "ws_local": (0.0, 4.0, "linear"),
    "ws_contrast": (0.0, 0.6, "linear"),
    "ws_min_area": (5, 200, "log"),
}

_BASE = WatershedOptions(
    retinex=(),
    bilateral=0,
    bilateral_colour=1.0,
    bilateral_space=3.0,
    reconstruct=0,
    stretch=0.1,
    threshold="otsu",
    lower=1.0,
    relative=0.0,
    local=1.3,
    markers="all",
    landscape="distance",
    neck=0.9,
    depth=0.5,
    spacing=0,
    core=0.5,
    passes=1,
    extent=0.4,
    grow=0,
    contrast=0.3,
    ellipse=0.0,
    border="keep",
)
# The predecessor's chain with its README's numbers, each stage done as it was meant: logarithms are not cut at 1e-5,
# the bilateral filter knows the range of its data (75 grey levels were meant, of a spread of about 40), reconstruction
# is of grey values and not of their bits, the stretch leaves 0.1 % out so that one pixel cannot scale the picture,
# objects at the frame get a peak too, and the lines between objects are not painted over. What is darker than its
# surroundings is 0, as reconstruction of the bits made it, for the threshold of 60 was found with that. Holes are
# filled, as drawing outlines did. All markers count and not the small ones alone, which left larger objects to a
# detector, and objects end at the markers: the margin of 5 x 10 pixels around was room for the flood, and no outline.
_CTCI = replace(
    _BASE,
    channel="grey",
    objects="bright",
    retinex=(80.0,),
    bilateral=5,
    bilateral_colour=2.0,
    bilateral_space=75.0,
    reconstruct=3,
    blur=1.1,
    black=0.0,
    level=60 / 255,
    local=0.0,
    opening=0,
    holes=-1,
    spacing=5,
    smooth=0.0,
    core=0.0,
    extent=0.0,
    contrast=0.0,
    min_area=1,
)
PRESETS: dict[str, WatershedOptions] = {
    "bubbles": replace(
        _BASE,
        objects="rims",
        lower=0.75,
        relative=0.4,
        local=0.0,
        opening=0,
        holes=-1,
        core=0.0,
        extent=0.0,
        contrast=0.0,
    ),
    "nuclei": replace(_BASE, local=1.1),
    "grains": replace(_BASE, objects="bright", threshold="none", local=3.0, contrast=0.0, neck=0.85),
    # crowded and glossy: each highlight floods its bubble down to the valleys
    "froth": replace(
        _BASE,
        objects="bright",
        threshold="none",
        local=0.0,
        opening=0,
        landscape="intensity",
        smooth=2.0,
        neck=0.8,
        core=0.0,
        extent=0.0,
        contrast=0.4,
    ),
    "fluorescence": replace(_BASE, objects="bright"),
    "histology": replace(_BASE, objects="dark", gamma=0.7, local=1.0, around=0.9, core=0.6, extent=0.5),
    # nuclei within cells: half of their height is cytoplasm, whose shades rise a little too, but only nuclei are round
    "cytology": replace(_BASE, objects="dark", local=0.9, core=0.75, extent=0.65, contrast=0.2, ellipse=3.0),
    "ctci": _CTCI,
    "ctci-code": replace(_CTCI, retinex=(50.0,), bilateral=9, reconstruct=5, blur=2.0, spacing=10),
}
PRESETS = {name: replace(options, preset=name) for name, options in PRESETS.items()}


def with_preset(options: WatershedOptions, preset: str) -> WatershedOptions:
    """The options with what a preset says where they say nothing; some fields may still be automatic."""
    given = {f.name: value for f in fields(options) if (value := getattr(options, f.name)) is not None}
    return replace(PRESETS[preset], **{**given, "preset": preset})


def add_watershed_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the watershed engine, one for each field of WatershedOptions."""
    group = parser.add_argument_group("watershed", "without a flag: from the preset and the picture; lengths in pixels")
    group.add_argument(
        "--preset", choices=PRESET_NAMES, default="auto", help="kind of picture; auto: chosen from each picture"
    )
    for one in fields(WatershedOptions)[1:]:
        group.add_argument(f"--ws-{one.name.replace('_', '-')}", **one.metadata)


def options_from(args: argparse.Namespace) -> WatershedOptions:
    """The options behind the flags of add_watershed_args."""
    given = {one.name: getattr(args, f"ws_{one.name}") for one in fields(WatershedOptions)[1:]}
    return WatershedOptions(preset=args.preset, **given)
