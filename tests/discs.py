"""Data sets of discs on noise, written as files; tests of commands share them."""

from pathlib import Path

import numpy as np

from image_io import write_image, write_mask


def draw_discs(seed, size=(32, 32), classes=1, channels=3, dtype=np.uint8):
    """An image (H, W, C) of discs on noise and its class indices (H, W); each class is bright in its own channel."""
    rng = np.random.default_rng(seed)
    height, width = size
    mask = np.zeros(size, np.uint8)
    rows, columns = np.ogrid[:height, :width]
    for number in range(2 + classes):
        centre = rng.uniform(0.2, 0.8, 2) * size
        inside = (rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 < (rng.uniform(0.12, 0.25) * min(size)) ** 2
        mask[inside] = number % classes + 1
    image = rng.normal(70, 12, (*size, channels))
    for label in range(1, classes + 1):
        image[mask == label, (label - 1) % channels] += 110
    top = 255 if dtype == np.uint8 else 65535
    return np.clip(image * top / 255, 0, top).astype(dtype), mask


def write_split(folder: Path, names, labels=(0, 255), sizes=((32, 32),), **how):
    """Write images/ and gt/ of a split; labels are the mask values of background and classes."""
    for place, name in enumerate(names):
        image, mask = draw_discs(abs(hash_name(name)), sizes[place % len(sizes)], len(labels) - 1, **how)
        suffix = ".png" if image.shape[2] in (1, 3) else ".tif"
        write_image(folder / "images" / f"{name}{suffix}", image)
        write_mask(folder / "gt" / f"{name}.png", np.array(labels, np.uint8)[mask])
    return folder


def hash_name(name: str) -> int:
    """A seed from a name, the same in every process."""
    return int.from_bytes(name.encode(), "little") % (2**31)


def write_dataset(root: Path, train=6, val=3, **how) -> Path:
    """Write <root>/train and <root>/val."""
    write_split(root / "train", [f"a{i}" for i in range(train)], **how)
    write_split(root / "val", [f"b{i}" for i in range(val)], **how)
    return root
