"""The contract between commands: what a network is, how pixels meet it, and the file that says so."""

import errno
import pickle
import re
import struct
import warnings
import zipfile
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

import predecessor
from image_io import atomic_write

FORMAT = 1

# What reading a damaged file was seen to raise, from PyTorch's readers and from pickle.
_DAMAGE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
    pickle.UnpicklingError,
)


@dataclass(frozen=True)
class Geometry:
    """How pixels meet the network.

    kind `resize`: the whole image is resized to `size` and the probabilities are resized back.
    kind `crops`: native scale; training saw crops of `size`, larger images go through tiling.py.
    Sizes are (height, width); tile, overlap and halo are pixels and belong to `crops`, as do
    window and tta (see tiling.predict_bands). Slides are read at `mpp`
    micrometres per pixel where both it and the slide's own are known, else reduced by `reduction`.
    """

    kind: str
    size: tuple[int, int]
    tile: int = 0
    overlap: int = 0
    halo: int = 0
    reduction: float = 1.0
    mpp: float = 0.0
    window: str = "hann"
    tta: str = "none"


@dataclass(frozen=True)
class ModelConfig:
    """Everything needed to rebuild a network and feed it. Stored inside the checkpoint.

    `labels` are the mask values learned, in order; empty means that any non-zero value is the object.
    `class_names` has a name for every class index, the implicit background included.
    `channels`, `mean` and `std` run in network order (R G B extras), in raw pixel units.
    `value_range` holds the lowest and highest value of each channel, `dtype` the type that training images had,
    `image_means` the lowest and highest mean of an image; None in older files.
    `val_share` is 0 where no share of the training images was held out: a fold, or validation on other sets alone.
    `tissue` is the rule (tissue.RULES) that training and its scores kept to on slides, or "none".
    `assumed` names what an old file does not say and was assumed, see assumptions.
    """

    architecture: str
    encoder: str
    labels: tuple[int, ...]
    class_names: tuple[str, ...]
    channels: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    geometry: Geometry
    ignore_label: int | None = None
    mask_threshold: float | None = None
    max_mask_val: int = 0
    add_dirs: tuple[str, ...] = ()
    roi_dir: str | None = None
    preprocess: tuple[str, ...] = ()
    dtype: str = "uint8"
    value_range: tuple[tuple[float, ...], tuple[float, ...]] = ((0.0,), (255.0,))
    image_means: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    stride: int = 32
    min_side: int = 32
    activation: str = "auto"
    batch: int = 8
    val_share: float = 0.2
    group_pattern: str | None = None
    tissue: str = "none"
    thresholds: dict[str, float] = field(default_factory=lambda: {"default": 0.5})
    assumed: tuple[str, ...] = ()
    format: int = FORMAT

    @property
    def assumptions(self) -> list[str]:
        """What a user must be told about this network before its answers are used; nothing of our own."""
        return predecessor.describe_assumptions(self.assumed, self.geometry.size)

    def with_size(self, size: tuple[int, int]) -> "ModelConfig":
        """The same network with whole images resized to another size, which somebody stated."""
        assumed = tuple(name for name in self.assumed if name != predecessor.SIZE)
        return replace(self, geometry=replace(self.geometry, size=size), assumed=assumed)

    @property
    def num_logits(self) -> int:
        """One for a single class against the background, else one for every class."""
        return 1 if len(self.class_names) == 2 and 0 not in self.labels else len(self.class_names)

    @property
    def tile_batch(self) -> int:
        """Tiles that are predicted at a time: as many pixels as a batch of training had, so that they fit into memory.

        On a CPU this is also quick: a large tile by itself stays in the cache.
        """
        if self.geometry.kind == "resize":
            return self.batch
        return max(1, self.batch * self.geometry.size[0] * self.geometry.size[1] // self.geometry.tile**2)

    def with_tile_batch(self, tiles: int) -> "ModelConfig":
        """The same network with another number of tiles at a time."""
        if self.geometry.kind == "resize":
            return replace(self, batch=tiles)
        crop = self.geometry.size[0] * self.geometry.size[1]
        return replace(self, batch=-(-tiles * self.geometry.tile**2 // crop))


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def config_to_dict(config: ModelConfig) -> dict[str, Any]:
    """Plain lists, numbers and strings, fit for a checkpoint, JSON and ONNX metadata."""
    return _plain(asdict(config))


def config_from_dict(values: dict[str, Any]) -> ModelConfig:
    """Rebuild a config.

    Raises:
        ValueError: a newer format, or entries that are missing or of another kind.
    """
    try:
        if values.get("format", 0) > FORMAT:
            raise ValueError(f"its format is {values['format']}, this version reads up to {FORMAT}: update Tessera")
        known = {item.name for item in fields(ModelConfig)}
        kept = {key: _frozen(value) for key, value in values.items() if key in known}
        return ModelConfig(**{**kept, "geometry": Geometry(**kept["geometry"])})
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"its description is incomplete or not one of Tessera ({error})") from error


def _frozen(value: Any) -> Any:
    """Lists as tuples, at every depth: what _plain made of them."""
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(item) for item in value)
    if isinstance(value, dict):
        return {key: _frozen(item) for key, item in value.items()}
    return value


def save_checkpoint(path: Path, config: ModelConfig, model_state: dict[str, Any], **more: Any) -> None:
    """Write a checkpoint whole or not at all. `more` holds plain types and tensors only.

    Raises:
        OSError: the folder is read-only or the disk full; the file that was there is whole.
    """
    write_content(path, {"format": FORMAT, "config": config_to_dict(config), "model_state_dict": model_state, **more})


def write_content(path: Path, content: dict[str, Any]) -> None:
    """Write a file of plain types and tensors whole or not at all.

    Raises:
        OSError: the folder is read-only or the disk full; the file that was there is whole.
    """
    with atomic_write(path) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            # PyTorch's writer closes its archive on the way out and then complains of that, not of the full disk.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def load_checkpoint(path: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """Read a checkpoint of Tessera or of its predecessor on the CPU; nothing in the file is executed.

    Returns:
        The description, and the content of the file. Of the predecessor's it is weights (see predecessor.translate),
        epoch and score alone: a run of it cannot be gone on with.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: truncated, not a checkpoint of either, or one whose pickle would run code.
    """
    saved = read_content(path)
    try:
        if predecessor.is_predecessors(saved):
            saved = _translated(saved)
        elif not isinstance(saved, dict) or "config" not in saved or "model_state_dict" not in saved:
            pretrained = _describe_pretrained(saved, path)
            raise ValueError(
                pretrained
                or "it has no 'config' entry: it is not a checkpoint written by train.py, "
                f"{predecessor.describe_stranger(saved)}"
            )
        return config_from_dict(saved["config"]), saved
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_content(path: Path) -> Any:
    """Read what torch.save wrote, on the CPU; nothing in the file is executed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: truncated, or one whose pickle would run code.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}; train.py writes it, -cd DIR finds the newest in a folder")
    try:
        with warnings.catch_warnings(), predecessor.inert_classes():
            warnings.simplefilter("ignore")  # of pickle protocols; the file is refused below if they matter
            return torch.load(path, map_location="cpu", weights_only=True)
    except _DAMAGE as error:
        raise ValueError(f"{path} {_refusal(error)}") from error
    except OSError as error:
        if error.errno != errno.EINVAL:  # a place before the file's beginning, which a cut archive points to
            raise
        raise ValueError(f"{path} {_refusal(error)}") from error


def _describe_pretrained(saved: Any, path: Path) -> str:
    """What to do with a file that pretrain.py wrote; nothing about other files."""
    if not isinstance(saved, dict) or not {"encoder_state_dict", "pretraining"} & saved.keys():
        return ""
    what, described = "the state of a run", saved.get("pretraining")
    if "encoder_state_dict" in saved:
        what, described = "an encoder file", saved
    if not isinstance(described, dict) or "method" not in described:
        return ""
    return (
        f"it is {what} of pretrain.py, an encoder ({described.get('encoder')}) without the decoder that makes masks. "
        f"Train one on labelled images: train.py --encoder {described.get('encoder')} --encoder-weights {path}, "
        "with an --exp-name of its own"
    )


def _translated(saved: dict[str, Any]) -> dict[str, Any]:
    """The content of a checkpoint of the predecessor in our form."""
    description, weights = predecessor.translate(saved)
    numbers = {key: saved[key] for key in ("epoch", "max_score") if isinstance(saved.get(key), (int, float))}
    return {"format": FORMAT, "config": description, "model_state_dict": weights, **numbers}


def _refusal(error: BaseException) -> str:
    """What is wrong with a file that could not be loaded; PyTorch's own advice, to load it unsafely, is left out."""
    code = re.search(r"GLOBAL ([\w.]+)", str(error))
    if code:
        return (
            f"is refused: loading it would run code ({code.group(1)}), and nothing in a file is executed. "
            f"Checkpoints of train.py hold plain types and tensors only.{predecessor.describe_code(code[1])}"
        )
    known = predecessor.describe_reading(error)
    if known:
        return known
    if isinstance(error, pickle.UnpicklingError):
        return "is not a checkpoint written by train.py: it is no archive of plain types and tensors"
    reason = str(error).split("\n")[0].split(" (")[0][:120]
    return f"is truncated or not a checkpoint ({reason}). Use another copy of the file."


def list_checkpoints(folder: Path) -> list[Path]:
    """The best checkpoints (*.pth) of a run folder, or of the run folders inside it, the oldest first.

    Encoder files of pretrain.py are left out, unless there is nothing else: then load_checkpoint says what they are.

    Raises:
        FileNotFoundError: no folder, or no *.pth in it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no folder {folder} to look for checkpoints in; expected a run folder such as logs/NAME"
        )
    found = sorted([*folder.glob("*.pth"), *folder.glob("*/*.pth")], key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"no *.pth in {folder} or in the folders inside it; train.py writes one for each run")
    return [path for path in found if not is_encoder_file(path)] or found


def is_encoder_file(path: Path) -> bool:
    """Whether pretrain.py wrote a file; its tensors are not read."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            content = archive.read(names[0]) if names else b""
    except (OSError, zipfile.BadZipFile):
        return False
    return b"encoder_state_dict" in content and b"model_state_dict" not in content


def find_checkpoint(folder: Path) -> Path:
    """The newest best checkpoint (*.pth) of a run folder, or in the run folders inside it.

    Raises:
        FileNotFoundError: no folder, or no *.pth in it.
    """
    return list_checkpoints(folder)[-1]
