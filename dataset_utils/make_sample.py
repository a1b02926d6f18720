"""Draw a sample data set: crowded glossy bubbles with exact masks and instance label maps.

Example:
    python -m dataset_utils.make_sample -o data/sample

Layout: <out>/{train,val}/{images,gt,labels}/ and a folder per extra channel, files paired by stem. Equal settings give
the same bytes. Brightness alone does not tell a bubble from the texture behind it, so a threshold scores badly here.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import cv2
import numpy as np

import cli
import image_io

FORMAT = 1  # raised when the same settings draw another picture
SETTINGS_FILE = "sample.json"
FULL_SCALE = {8: 255, 16: 40_000}  # 16-bit cameras seldom use their whole range, so neither do we
OWN_FOLDERS = ("images", "gt", "masks", "labels")
WRITERS = 4
MAX_OVERLAP = 0.35  # of a new bubble's area lies on bubbles that are there
MIN_VISIBLE = 0.35  # of a bubble's area, else it is left out: nobody could outline it


@dataclass(frozen=True)
class Kind:
    """How a class of bubbles looks: body brightness, dark or bright rim, highlight strength, rings, colour."""

    body: tuple[float, float] = (0.26, 0.44)
    rim: float = -0.55
    highlight: float = 1.0
    rings: float = 0.0
    tint: tuple[float, float, float] = (1.0, 1.0, 1.0)


BACKGROUND_TINT = (1.0, 1.0, 0.98)
KINDS = (
    Kind(),
    Kind(body=(0.14, 0.24), rim=2.4, highlight=0.6),
    Kind(body=(0.80, 0.95), rim=-0.25, highlight=0.1),
    Kind(tint=(0.55, 0.85, 1.45)),
    Kind(tint=(1.45, 0.85, 0.50)),
    Kind(body=(0.45, 0.65), rings=0.55, highlight=0.3),
    Kind(tint=(0.60, 1.35, 0.60)),
    Kind(body=(0.05, 0.10), rim=-0.3, highlight=0.15),
)


@dataclass(frozen=True)
class SampleSettings:
    """What to draw. The same settings give the same files, byte for byte.

    size is (height, width); density the share of the picture that bubbles cover; radius (smallest, largest) in pixels,
    None fits it to the size.
    """

    count: int = 40
    val_count: int = 8
    size: tuple[int, int] = (256, 256)
    density: float = 0.5
    radius: tuple[float, float] | None = None
    classes: int = 1
    extra: tuple[str, ...] = field(default_factory=tuple)
    bands: int = 3
    bits: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse settings that cannot be drawn, before anything is written."""
        for name, least, most in (("count", 1, 99_999), ("val_count", 0, 99_999), ("bands", 1, 64), ("seed", 0, 2**32)):
            check_range(name, getattr(self, name), least, most)
        for side in self.size:
            check_range("size", side, 16, 16_384)
        check_range("classes", self.classes, 1, len(KINDS))
        check_range("density", self.density, 0.05, 0.8)
        if self.bits not in FULL_SCALE:
            raise ValueError(f"bits is {self.bits}, expected 8 or 16")
        if self.radius is not None and not 2 <= self.radius[0] <= self.radius[1] <= min(self.size) / 2:
            raise ValueError(
                f"radius is {self.radius[0]:g} to {self.radius[1]:g}, expected 2 <= smallest <= largest <= "
                f"{min(self.size) / 2:g}, half of the shorter side"
            )
        for name in self.extra:
            if not name.replace("-", "").replace("_", "").isalnum() or name in OWN_FOLDERS:
                raise ValueError(f"extra folder {name!r}: expected letters and digits, and none of {OWN_FOLDERS}")
        if len({name.lower() for name in self.extra}) < len(self.extra):
            raise ValueError(f"extra folders {' '.join(self.extra)}: expected each name once")

    @property
    def radii(self) -> tuple[float, float]:
        """Smallest and largest radius in pixels."""
        if self.radius is not None:
            return self.radius
        side = min(self.size)
        return min(max(side / 50, 2.0), 5.0), min(max(0.14 * side, 4.0), 40.0)


def check_range(name: str, value: float, least: float, most: float) -> None:
    """Raise ValueError unless least <= value <= most."""
    if not least <= value <= most:
        raise ValueError(f"{name} is {value}, expected {least} to {most}")


@dataclass(frozen=True)
class Bubble:
    """One bubble on its window of the picture; rho is 0 in its middle and 1 on its outline."""

    window: tuple[slice, slice]
    rho: np.ndarray  # (h, w) float32
    across: np.ndarray  # (h, w) float32, in radii, along the bubble's short axis
    along: np.ndarray  # (h, w) float32, in radii, along its long axis
    radius: float
    kind: int


@dataclass(frozen=True)
class Scene:
    """One picture and its truth.

    image (H, W, bands) and extras (H, W, 1) are uint8 or uint16; mask (H, W) uint8 is {0, 255}, or 0..classes for two
    and more; labels (H, W) uint16 numbers the visible part of each bubble from 1.
    """

    image: np.ndarray
    extras: dict[str, np.ndarray]
    mask: np.ndarray
    labels: np.ndarray


def draw_scene(settings: SampleSettings, rng: np.random.Generator) -> Scene:
    """Draw one picture and its truth."""
    bubbles = place_bubbles(settings, rng)
    labels = draw_labels(bubbles, settings.size)
    material = np.array([0, *(bubble.kind + 1 for bubble in bubbles)], np.uint8)[labels]
    matte, gloss = shade_scene(bubbles, settings.size, rng)
    channels = expose(matte, gloss, material, settings, rng)
    values = np.clip(np.rint(channels * FULL_SCALE[settings.bits]), 0, FULL_SCALE[settings.bits])
    values = values.astype(np.uint8 if settings.bits == 8 else np.uint16)
    extras = {name: values[..., settings.bands + number, None] for number, name in enumerate(settings.extra)}
    mask = material if settings.classes > 1 else (labels > 0).astype(np.uint8) * np.uint8(255)
    return Scene(values[..., : settings.bands], extras, mask, labels)


def place_bubbles(settings: SampleSettings, rng: np.random.Generator) -> list[Bubble]:
    """Bubbles from far to near that cover about the wanted share and can all be seen."""
    height, width = settings.size
    small, large = settings.radii
    crowd = smooth_field(settings.size, max(height, width) / 5, rng)
    crowd = (crowd - crowd.min()) / max(float(np.ptp(crowd)), 1e-6)
    taken = np.zeros(settings.size, bool)
    goal = settings.density * taken.size
    mean_area = np.mean(bubble_radii(small, large, rng.random(4096)) ** 2) * np.pi
    radii = bubble_radii(small, large, rng.random(int(0.9 * goal / mean_area) + 1))
    placed: list[tuple[float, Bubble]] = []
    covered, patience = 0, 60 * len(radii) + 2000
    waiting = list(np.sort(radii))
    while covered < goal and patience > 0:
        patience -= 1
        centre = rng.uniform((0, 0), settings.size)
        row, col = (int(np.clip(place, 0, side - 1)) for place, side in zip(centre, settings.size, strict=True))
        if crowd[row, col] < rng.random() * 0.8:
            continue
        radius = float(waiting[-1] if waiting else bubble_radii(small, large, rng.random() * 0.5))
        bubble = shape_bubble(centre, radius, int(rng.integers(settings.classes)), settings.size, rng)
        inside, there = bubble.rho < 1, taken[bubble.window]
        area, shared = int(inside.sum()), int((inside & there).sum())
        if area < 6 or shared > MAX_OVERLAP * area or covered + area - shared > goal + 0.02 * taken.size:
            if waiting and patience % 8 == 0:  # the largest that waits finds no room: go on with a smaller one
                waiting.pop()
            continue
        there |= inside
        covered += area - shared
        placed.append((0.6 * float(np.log(radius)) + 0.5 * rng.normal(), bubble))
        del waiting[-1:]
    bubbles = [bubble for _, bubble in sorted(placed, key=lambda pair: pair[0])]
    return [bubble for bubble, seen in zip(bubbles, visible_shares(bubbles, settings.size), strict=True) if seen]


def bubble_radii(small: float, large: float, chance: np.ndarray | float) -> np.ndarray:
    """Radii for uniform numbers in [0, 1]: many small bubbles, few large ones."""
    return np.asarray(small * (large / small) ** (np.asarray(chance) ** 1.7))


def shape_bubble(
    centre: np.ndarray, radius: float, kind: int, size: tuple[int, int], rng: np.random.Generator
) -> Bubble:
    """A round, egg-shaped or elongated outline of about the given radius around (row, column), leaning to upright."""
    stretch = rng.uniform(1.0, 1.15) if rng.random() < 0.5 else rng.uniform(1.15, 1.9)
    short, long = radius / np.sqrt(stretch), radius * np.sqrt(stretch)
    angle = rng.normal(0, 0.45)
    reach = 1.3 * long + 2
    top, left = (max(int(place - reach), 0) for place in centre)
    bottom, right = (min(int(place + reach) + 1, side) for place, side in zip(centre, size, strict=True))
    rows = np.arange(top, max(bottom, top), dtype=np.float32)[:, None] - np.float32(centre[0])
    cols = np.arange(left, max(right, left), dtype=np.float32)[None] - np.float32(centre[1])
    across = (cols * np.cos(angle) + rows * np.sin(angle)) / np.float32(short)
    along = (rows * np.cos(angle) - cols * np.sin(angle)) / np.float32(long)
    theta = np.arctan2(along, across)
    uneven = rng.uniform(0, 0.05, 2)
    phase = rng.uniform(0, 2 * np.pi, 2)
    outline = 1 + uneven[0] * np.cos(2 * theta + phase[0]) + uneven[1] * np.cos(3 * theta + phase[1])
    rho = (np.hypot(across, along) / outline).astype(np.float32)
    return Bubble((slice(top, bottom), slice(left, right)), rho, across, along, radius, kind)


def draw_labels(bubbles: list[Bubble], size: tuple[int, int]) -> np.ndarray:
    """Number the visible part of each bubble from 1, later bubbles in front: (H, W) uint16."""
    if len(bubbles) > 65_535:
        raise ValueError(
            f"{len(bubbles)} bubbles in one picture, expected 65535 or fewer. Use larger radii or a smaller size"
        )
    labels = np.zeros(size, np.uint16)
    for number, bubble in enumerate(bubbles, start=1):
        labels[bubble.window][bubble.rho < 1] = number
    return labels


def visible_shares(bubbles: list[Bubble], size: tuple[int, int]) -> list[bool]:
    """Which bubbles show enough of themselves to be outlined."""
    seen = np.bincount(draw_labels(bubbles, size).ravel(), minlength=len(bubbles) + 1)[1:]
    return [count >= max(6, MIN_VISIBLE * (bubble.rho < 1).sum()) for count, bubble in zip(seen, bubbles, strict=True)]


def shade_scene(
    bubbles: list[Bubble], size: tuple[int, int], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Paint background and bubbles from far to near, under even light.

    Returns:
        (matte, gloss), each (H, W) float32: light that takes the material's colour, and mirrored light, always white.
    """
    matte, gloss = shade_background(size, rng)
    lamp = rng.uniform((-0.15, -0.40), (0.15, -0.05))
    for bubble in bubbles:
        inside = bubble.rho < 1
        shadow = 1 - 0.5 * np.exp(-np.maximum(bubble.rho - 1, 0) * max(bubble.radius, 4.0) / 1.8)
        matte[bubble.window] *= shadow
        gloss[bubble.window] *= shadow
        body, shine = shade_bubble(bubble, KINDS[bubble.kind], lamp + rng.normal(0, 0.06, 2), rng)
        matte[bubble.window][inside] = body[inside]
        gloss[bubble.window][inside] = shine[inside]
    return matte, gloss


def shade_bubble(
    bubble: Bubble, kind: Kind, lamp: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """(matte, gloss) of one bubble on its window; lamp is the highlight's place (across, along) in radii."""
    rho = np.minimum(bubble.rho, 1)
    lift = np.sqrt(1 - rho**2)  # height of the surface, 1 in the middle
    body = rng.uniform(*kind.body) * (0.35 + 0.65 * lift)
    body *= 1 - 0.15 * bubble.along + 0.08 * rng.normal() * bubble.across
    body *= 1 + kind.rings * np.sin(rho * max(4.0, bubble.radius) * 0.9)
    edge = np.clip((rho - 0.72) / 0.28, 0, 1) if kind.rim > 0 else np.clip((rho - 0.82) / 0.18, 0, 1)
    body *= 1 + kind.rim * edge
    core = rng.uniform(0.09, 0.16) + 0.5 / bubble.radius
    slant = (bubble.across - lamp[0]) + rng.normal(0, 0.25) * (bubble.along - lamp[1])
    distance = slant**2 + ((bubble.along - lamp[1]) / rng.uniform(1.0, 1.8)) ** 2
    glow = rng.uniform(0.12, 0.26) * np.exp(-distance / (2.2 * core) ** 2) + 0.14 * np.exp(-distance / 0.36)
    shine = rng.uniform(0.65, 1.0) * np.exp(-distance / core**2) + glow
    below = np.clip(bubble.along, 0, 1) * np.exp(-(((rho - 0.80) / 0.07) ** 2))
    return body, kind.highlight * (shine + rng.uniform(0, 0.16) * below)


def shade_background(size: tuple[int, int], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(matte, gloss) of what lies behind: streaked froth of bubbles too small to count, with glints in clusters."""
    coarse = smooth_field(size, 10, rng)
    streaks = smooth_field(size, (4.0, 1.2), rng)
    dots = (rng.random(size, np.float32) < 0.035) * rng.random(size, np.float32)
    core, ring = (cv2.GaussianBlur(dots, (0, 0), wide, sigmaY=1.3 * wide) for wide in (0.9, 2.0))
    matte = 0.34 + 0.05 * coarse + 0.05 * streaks - 3.0 * (ring - ring.mean()) + 2.5 * core
    glints = smooth_field(size, (2.2, 0.8), rng) + 0.7 * coarse
    gloss = 0.28 * np.clip(glints - 1.3, 0, 2.0) + 1.2 * core * np.clip(1 + coarse, 0, 2)
    return np.maximum(matte, 0.05).astype(np.float32), gloss.astype(np.float32)


def smooth_field(size: tuple[int, int], sigma: float | tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """Gaussian noise blurred by sigma pixels (rows, columns), mean 0 and deviation 1: (H, W) float32."""
    down, right = sigma if isinstance(sigma, tuple) else (sigma, sigma)
    shrink = max(int(min(down, right) / 3), 1)  # wide blurs are drawn small and enlarged
    small = [max(side // shrink, 2) for side in size]
    noise = cv2.GaussianBlur(
        rng.standard_normal(small, np.float32),
        (0, 0),
        right / shrink,
        sigmaY=down / shrink,
        borderType=cv2.BORDER_REFLECT,
    )
    noise = cv2.resize(noise, size[::-1], interpolation=cv2.INTER_CUBIC)
    return (noise - noise.mean()) / max(float(noise.std()), 1e-6)


def expose(
    matte: np.ndarray, gloss: np.ndarray, material: np.ndarray, settings: SampleSettings, rng: np.random.Generator
) -> np.ndarray:
    """Light the scene unevenly and take it with a slightly blurred, noisy camera.

    Returns:
        (H, W, bands + extras) float32, mostly in [0, 1].
    """
    colours = spectra(settings.bands, len(settings.extra))
    light = uneven_light(settings.size, rng)
    blur, noise = rng.uniform(0.5, 0.8), rng.uniform(0.012, 0.03)
    cast = rng.normal(1, 0.025, (colours.shape[1],))
    taken = np.empty((*settings.size, colours.shape[1]), np.float32)
    for number, colour in enumerate(colours.T.astype(np.float32)):
        seen = (matte * colour[material] + gloss) * light * np.float32(cast[number])
        seen = cv2.GaussianBlur(seen.astype(np.float32), (0, 0), blur)
        grain = rng.standard_normal(settings.size, np.float32)
        taken[..., number] = seen + noise * grain * np.sqrt(0.4 + np.clip(seen, 0, 1))
    return taken


def uneven_light(size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Brightness of the light, about 1 and never dark: (H, W) float32, a slope and soft patches."""
    rows, cols = (np.linspace(-1, 1, side, dtype=np.float32) for side in size)
    down, right = rng.uniform(-0.35, 0.35, 2).astype(np.float32)
    light = 1 + 0.22 * smooth_field(size, max(size) / 3, rng) + down * rows[:, None] + right * cols
    return np.clip(light, 0.45, 1.7) * np.float32(rng.uniform(0.85, 1.1))


def spectra(bands: int, extras: int) -> np.ndarray:
    """How bright each material is in each channel: (1 + kinds, bands + extras), row 0 the background.

    One or two bands are grey, grey + infrared; from three on they are red, green, blue, infrared bands. Infrared and
    extra channels tell materials apart by a factor of their own, the same in every data set.
    """
    tints = np.array([BACKGROUND_TINT, *(kind.tint for kind in KINDS)])
    visible = tints if bands >= 3 else tints.mean(1, keepdims=True)
    hidden = bands - visible.shape[1] + extras
    rng = np.random.default_rng(8_191)
    unseen = np.column_stack(
        [rng.permutation(np.linspace(0.8, 1.5, len(tints))) for _ in range(hidden)] or [tints[:, :0]]
    )
    unseen[0] = 0.65
    return np.hstack([visible, unseen])


def make_sample(output_dir: Path, settings: SampleSettings) -> bool:
    """Write a sample data set, or find it there.

    Pictures are drawn into a hidden folder beside output_dir that takes its name when all are there; an interrupted run
    goes on where it stopped.

    Returns:
        True when it was drawn, False when output_dir held it already.

    Raises:
        FileExistsError: output_dir holds other files, or a sample of other settings.
    """
    output_dir = output_dir.resolve()
    scenes = list(list_scenes(settings))
    files = {path for _, paths in scenes for path in paths.values()} | {Path(SETTINGS_FILE)}
    if is_there(output_dir, settings, files):
        return False
    partial_dir = open_partial(output_dir.with_name(f".{output_dir.name}.partial"), settings)
    left = [
        (seed, paths) for seed, paths in scenes if not all((partial_dir / path).exists() for path in paths.values())
    ]
    with ThreadPoolExecutor(WRITERS) as pool:  # a picture waits for the disk longer than it takes to draw
        for _ in pool.map(lambda scene: write_scene(partial_dir, settings, *scene), left):
            pass
    for path in sorted(partial_dir.rglob("*.tmp")):  # of a run that was killed while it wrote
        path.unlink()
    if output_dir.exists():
        output_dir.rmdir()  # empty, and some systems rename onto nothing only
    partial_dir.rename(output_dir)
    return True


def list_scenes(settings: SampleSettings) -> Iterator[tuple[list[int], dict[str, Path]]]:
    """Yield each picture's seed, and its files by folder name relative to the data set; images comes last."""
    suffix = ".png" if settings.bands in (1, 3) else ".tif"
    for part, (split, count) in enumerate((("train", settings.count), ("val", settings.val_count))):
        for number in range(count):
            stem = f"{split}_{number:04d}"
            folders = ("labels", "gt", *settings.extra)
            paths = {folder: Path(split, folder, f"{stem}.png") for folder in folders}
            yield [settings.seed, part, number], paths | {"images": Path(split, "images", stem + suffix)}


def settings_record(settings: SampleSettings) -> dict:
    """What sample.json holds: settings as plain JSON types, and the number of the drawing's version."""
    return json.loads(json.dumps({"format": FORMAT} | asdict(settings) | {"radius": settings.radii}))


def read_record(folder: Path) -> dict | None:
    """The sample.json of a folder, None where there is none that can be read."""
    try:
        return json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def is_there(output_dir: Path, settings: SampleSettings, files: set[Path]) -> bool:
    """Tell whether the folder is this sample already; refuse a folder that is something else."""
    if output_dir.exists() and not output_dir.is_dir():
        raise FileExistsError(f"{output_dir} is a file, expected a folder: choose another name")
    if not output_dir.exists() or not any(output_dir.iterdir()):
        return False
    found, wanted = read_record(output_dir), settings_record(settings)
    if found is None:
        raise FileExistsError(f"{output_dir} holds other files; a sample is drawn into a new or empty folder only")
    differ = [f"{key} {found.get(key)} there, {wanted[key]} asked" for key in wanted if found.get(key) != wanted[key]]
    if differ:
        raise FileExistsError(
            f"{output_dir} is a sample with other settings ({'; '.join(differ)}). Choose another folder, or delete it"
        )
    missing = sorted(path.as_posix() for path in files if not (output_dir / path).exists())
    if missing:
        raise FileExistsError(
            f"{len(missing)} of {len(files)} files of the sample {output_dir} are gone, first: {missing[0]}. "
            f"Delete the folder to draw it again"
        )
    return True


def open_partial(partial_dir: Path, settings: SampleSettings) -> Path:
    """Make the folder that a run draws into, or take over that of a run with the same settings."""
    wanted = settings_record(settings)
    if partial_dir.exists() and any(partial_dir.iterdir()):
        found = read_record(partial_dir)
        if found is None:
            raise FileExistsError(f"{partial_dir} holds other files, but unfinished pictures go there: move it away")
        if found != wanted:
            shutil.rmtree(partial_dir)  # the rest of an interrupted run with other settings
    image_io.write_text(partial_dir / SETTINGS_FILE, json.dumps(wanted, indent=2) + "\n")
    return partial_dir


def write_scene(root: Path, settings: SampleSettings, seed: list[int], paths: dict[str, Path]) -> None:
    """Draw one picture and write its files, paths by folder name relative to root."""
    scene = draw_scene(settings, np.random.default_rng(seed))
    image_io.write_mask(root / paths["labels"], scene.labels)
    image_io.write_mask(root / paths["gt"], scene.mask)
    for folder, image in (scene.extras | {"images": scene.image}).items():
        image_io.write_image(root / paths[folder], image)


def build_parser() -> argparse.ArgumentParser:
    """Make the parser; the defaults are those of SampleSettings."""
    default = SampleSettings()
    parser = cli.make_parser("Draw a sample data set of crowded bubbles with exact masks.")
    add = parser.add_argument
    add("-o", "--output-dir", type=Path, required=True, metavar="DIR", help="new or empty folder for the data set")
    add("--count", type=int, default=default.count, metavar="N", help="training images")
    add("--val-count", type=int, default=default.val_count, metavar="N", help="validation images")
    add("--size", type=int, nargs="+", default=default.size, metavar="PX", help="height and width, or one for both")
    add("--density", type=float, default=default.density, metavar="X", help="share of a picture that bubbles cover")
    add(
        "--radius",
        type=float,
        nargs=2,
        metavar=("MIN", "MAX"),
        help="bubble radii in pixels; fitted to the size if left out",
    )
    add(
        "--classes",
        type=int,
        default=default.classes,
        metavar="N",
        help="kinds of bubbles; from 2 on gt holds 1..N, else 255",
    )
    add(
        "--extra",
        nargs="+",
        metavar="NAME",
        help="folders with one more channel each, such as nir",
    )
    add(
        "--bands",
        type=int,
        default=default.bands,
        metavar="N",
        help="channels of an image; 1 and 3 give PNG, others TIFF",
    )
    add("--bits", type=int, choices=sorted(FULL_SCALE), default=default.bits, help="8 holds 0..255, 16 holds 0..40000")
    add("--seed", type=cli.natural, default=default.seed, metavar="N", help="seed of everything random")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Draw what the flags say."""
    parser = build_parser()
    args = cli.parse(parser, argv)
    output_dir = args.output_dir
    values = {item.name: getattr(args, item.name) for item in fields(SampleSettings)}
    if len(values["size"]) > 2:
        parser.error(f"argument --size: {len(values['size'])} numbers, expected height and width or one for both")
    values["size"] = (values["size"][0], values["size"][-1])
    values["radius"] = tuple(values["radius"]) if values["radius"] else None
    values["extra"] = tuple(values["extra"] or ())
    try:
        settings = SampleSettings(**values)
    except ValueError as error:
        parser.error(str(error))
    try:
        drawn = make_sample(output_dir, settings)
    except OSError as error:
        sys.exit(f"make_sample: {error}")
    height, width = settings.size
    state = "drawn" if drawn else "already there"
    print(f"{output_dir}: {settings.count} train and {settings.val_count} val images, {height} x {width}, {state}")


if __name__ == "__main__":
    main()
