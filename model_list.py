"""What train.py --list-models prints: architectures and encoders with their numbers of parameters.

The numbers of the encoders lie in a file, for counting them takes minutes.
"""

import argparse
import contextlib
import difflib
import fnmatch
import importlib.metadata
import json
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SIZES_FILE = Path(__file__).resolve().parent / "networks" / "encoder_sizes.json"
REFERENCE_ENCODER = {"dpt": "tu-vit_tiny_patch16_224", "plain-unet": "plain-16"}  # of the others: resnet34
OWN = ("plain-unet",)  # architectures that are not smp's
MEASURED = 12  # encoders that are not on file are built and counted, so many at most: half a second each
FITS = {
    "all": "",
    "dpt": "-m dpt only",
    "plain": "-m plain-unet only",
    "none": "not usable: no architecture takes its features",
}
NAME_WIDTH = 44


class ListModels(argparse.Action):
    """Print the networks whose names hold the given text, then leave."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        super().__init__(option_strings, dest, nargs="?", default=argparse.SUPPRESS, **options)

    def __call__(self, parser: argparse.ArgumentParser, _: Any, values: Any, __: Any = None) -> None:
        sys.stdout.write("\n".join(list_models(values or "")) + "\n")
        parser.exit()


def add_list_args(parser: argparse.ArgumentParser) -> None:
    """Add the flag that lists networks."""
    parser.add_argument(
        "--list-models",
        action=ListModels,
        metavar="NAME",
        help="print architectures and encoders with NAME in their names, with their parameters, and leave",
    )


def list_models(pattern: str) -> list[str]:
    """Lines of a table of architectures and one of encoders whose names hold the pattern, in any case.

    Args:
        pattern: part of a name; the stars of a shell are understood. Empty: all architectures, and families of
            encoders.
    """
    sizes = read_sizes()
    encoders = known_encoders(sizes)
    lines = architecture_lines(sizes["architectures"], pattern)
    wanted = sorted(name for name in encoders if matches(name, pattern))
    if lines and wanted:
        lines.append("")
    if wanted:
        lines += encoder_lines(wanted, encoders) if pattern else family_lines(wanted, encoders)
    if not lines:
        close = difflib.get_close_matches(pattern, [*sizes["architectures"], *encoders], n=4, cutoff=0.5)
        near = f"; the nearest are {', '.join(close)}" if close else ""
        lines = [f"no architecture and no encoder has a name with {pattern!r}{near}"]
    return lines


def read_sizes() -> dict[str, Any]:
    """Numbers of parameters by name, as make_encoder_sizes left them; an encoder has [parameters, what it fits]."""
    return json.loads(SIZES_FILE.read_text(encoding="utf-8"))


def known_encoders(sizes: Mapping[str, Any]) -> dict[str, tuple[int, str]]:
    """Parameters of the encoders of the installed libraries, and what they fit; (0, "") where that is not on file.

    A file that names the versions of the libraries has all of their encoders; then they need not be asked.
    """
    on_file = {name: (int(count), str(fits)) for name, (count, fits) in sizes["encoders"].items()}
    if sizes["versions"] and sizes["versions"] == {
        name: importlib.metadata.version(name) for name in sizes["versions"]
    }:
        return on_file
    from model import list_encoders

    return {name: on_file.get(name, (0, "")) for name in list_encoders()}


def matches(name: str, pattern: str) -> bool:
    """Whether a name holds the pattern, in which * is any text."""
    return fnmatch.fnmatchcase(name.lower(), f"*{pattern.lower()}*")


def architecture_lines(sizes: Mapping[str, int], pattern: str) -> list[str]:
    """A table of the architectures with such names."""
    lines = []
    for name in (name for name in sizes if matches(name, pattern)):
        note = f"with {REFERENCE_ENCODER.get(name, 'resnet34')}{', our own' if name in OWN else ''}"
        lines.append(f"{name:{NAME_WIDTH}} {spell_size(sizes[name]):>10}  {note}")
    return lines and [f"{'architecture (-m)':{NAME_WIDTH}} {'parameters':>10}", *lines]


def encoder_lines(names: Sequence[str], encoders: Mapping[str, tuple[int, str]]) -> list[str]:
    """A table of encoders; the few whose size is not on file are built and counted."""
    missing = [name for name in names if not encoders[name][1]]
    counted = {name: measure_encoder(name) for name in missing} if len(missing) <= MEASURED else {}
    lines = [f"{'encoder (--encoder)':{NAME_WIDTH}} {'parameters':>10}"]
    for name in names:
        size, fits = counted.get(name, encoders[name])
        note = "not counted: give more of its name" if not fits else FITS[fits]
        lines.append(f"{name:{NAME_WIDTH}} {spell_size(size):>10}  {note}".rstrip())
    return lines


def family_lines(names: Sequence[str], encoders: Mapping[str, tuple[int, str]]) -> list[str]:
    """A table of families of encoders: those whose names begin with the same letters."""
    families: dict[str, list[int]] = {}
    for name in names:
        families.setdefault(re.split(r"[^a-z]", name.removeprefix("tu-").lower())[0], []).append(encoders[name][0])
    title = f"{'encoders (--encoder), by family':{NAME_WIDTH}} {'number':>10}  parameters"
    lines = [title]
    for family, sizes in sorted(families.items()):
        known = sorted(size for size in sizes if size)
        span = f"{spell_size(known[0])} to {spell_size(known[-1])}" if len(known) > 1 else spell_size(sum(known))
        lines.append(f"{family:{NAME_WIDTH}} {len(sizes):>10}  {span}")
    return [*lines, "", "--list-models NAME lists those with NAME in their name, such as resnet or 'convnext*tiny'"]


def spell_size(count: int) -> str:
    """A number of parameters in thousands or millions; - where there is none."""
    if not count:
        return "-"
    return f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count / 1e3:.0f} k"


def measure_encoder(name: str) -> tuple[int, str]:
    """Parameters of an encoder with three channels, and a key of FITS; nothing is downloaded."""
    import torch

    from model import BUILD_ERRORS, PLAIN_UNET, PLAIN_WIDTHS, build_model, build_smp, count_parameters, published_side

    if name in PLAIN_WIDTHS:
        own: Any = build_model(PLAIN_UNET, name, in_channels=3, num_logits=1)
        return count_parameters(own.encoder), "plain"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for architecture, fits in (("unet", "all"), ("dpt", "dpt")):
            try:
                with torch.device("meta"), torch.no_grad():
                    network: Any = build_smp(architecture, name, None, in_channels=3, classes=1)
                    network.eval()(torch.zeros(1, 3, *[published_side(name)] * 2))
                return count_parameters(network.encoder), fits
            except (*BUILD_ERRORS, NotImplementedError) as error:
                reason = str(error)
            if "meta" in reason:  # it reads the values of a tensor, which meta does not have
                with contextlib.suppress(*BUILD_ERRORS):
                    network = build_smp(architecture, name, None, in_channels=3, classes=1)
                    return count_parameters(network.encoder), fits
    return 0, "none"


def measure_architecture(name: str) -> int:
    """Parameters of a network of one class with its reference encoder."""
    from model import build_outline, count_parameters

    return count_parameters(build_outline(name, REFERENCE_ENCODER.get(name, "resnet34")))
