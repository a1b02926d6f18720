"""Load SAM: checkpoints of segment-anything, and folders of transformers with SAM or SAM 2. Nothing is downloaded.

Example:
    sam = load_sam(Path("sam_vit_b_01ec64.pth"), "cuda")
    found = sam.segment_boxes(read_image(Path("froth.png")), np.array([[10, 20, 60, 80]]))
"""

import hashlib
import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from annotation.sam_engine import Sam
from annotation.sam_options import SamOptions

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
SIZES = {(768, 12): "vit_b", (1024, 24): "vit_l", (1280, 32): "vit_h"}  # width and depth of the encoder
WRAPPERS = ("model", "state_dict", "model_state", "model_state_dict")
PARTS = ("image_encoder.", "prompt_encoder.", "mask_decoder.")
FOLDERS = {"sam": "SamModel", "sam2": "Sam2Model", "sam2_video": "Sam2Model"}  # model_type in config.json
PUBLISHED = {"": "sam_vit_b_01ec64.pth", "sam2": "facebook/sam2.1-hiera-tiny"}
UNREADABLE = (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, AttributeError, OSError)


def load_sam(path: Path, device: str = "cpu", options: SamOptions | None = None) -> Sam:
    """Load SAM from a checkpoint file or a folder.

    Args:
        path: .pth of segment-anything (vit_b, vit_l, vit_h or a like one of another size: told from the tensors), or
            a folder that transformers saved, with SAM or SAM 2.
        device: of torch, such as cpu or cuda.
        options: settings; options.sam_type refuses other weights.

    Raises:
        FileNotFoundError: there is no such file or folder; names of a hub are not looked up.
        ValueError: it holds something else, another type than asked for, or not all weights.
        ModuleNotFoundError: the package that it needs is missing; the message names the pip command.
    """
    options = options or SamOptions()
    path = Path(path)
    if path.is_dir():
        return Sam(_load_folder(path, torch.device(device), options.sam_type), options)
    if path.is_file():
        return Sam(_load_checkpoint(path, torch.device(device), options.sam_type), options)
    raise FileNotFoundError(
        f"{path} is neither a file nor a folder; expected weights of SAM on this computer, such as "
        f"{PUBLISHED['']}, or a folder of transformers. Nothing is downloaded: get a model of a hub with "
        f"'hf download {PUBLISHED['sam2']} --local-dir sam2' and name the folder"
    )


def _check_type(found: str, wanted: str, path: Path) -> None:
    if wanted not in ("auto", found):
        raise ValueError(
            f"{path} holds {found}, expected {wanted} as --sam-type says: leave --sam-type out, or name other weights"
        )


# ----------------------------------------------------------------------------------------------------------------------
# segment-anything


@dataclass(frozen=True)
class Shape:
    """An encoder, as its tensors tell."""

    width: int
    depth: int
    heads: int
    patch: int
    side: int
    window: int
    whole: tuple[int, ...]  # blocks with attention over the whole square
    channels: int

    @property
    def name(self) -> str:
        """vit_b, vit_l, vit_h or a description."""
        return SIZES.get((self.width, self.depth), f"a ViT of width {self.width} and depth {self.depth}")


class SegmentAnything:
    """A network of segment-anything; see sam_engine.Network."""

    keep_ratio = True
    mean: Sequence[float] = MEAN
    std: Sequence[float] = STD

    def __init__(self, model: Any, path: Path, digest: str, device: torch.device) -> None:
        self.name, self.digest, self.device = str(path), digest, device
        self.model = model.to(device).eval()
        self.side = int(model.image_encoder.img_size)

    def encode(self, pixels: Tensor) -> list[Tensor]:
        return [self.model.image_encoder(pixels)]

    def decode(
        self, features: list[Tensor], boxes: Tensor | None, points: Tensor | None, labels: Tensor | None, several: bool
    ) -> tuple[Tensor, Tensor]:
        prompts = self.model.prompt_encoder
        sparse, dense = prompts(points=None if points is None else (points, labels), boxes=boxes, masks=None)
        return self.model.mask_decoder(
            image_embeddings=features[0],
            image_pe=prompts.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=several,
        )


def _load_checkpoint(path: Path, device: torch.device, wanted: str) -> SegmentAnything:
    state = _read_tensors(path)
    shape = describe_encoder(state, path)
    _check_type(shape.name, wanted, path)
    model = build_segment_anything(shape)
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"{path} looks like {shape.name} of segment-anything but does not fit: {error}; expected all tensors of "
            f"such a checkpoint as {PUBLISHED['']} has them: download it again"
        ) from error
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return SegmentAnything(model.requires_grad_(False), path, digest, device)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """The three parts of SAM in a checkpoint, in float32; nothing in the file is executed."""
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        raise ValueError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}); expected a .pth file of segment-anything "
            f"with nothing but tensors, such as {PUBLISHED['']}: download it again"
        ) from error
    if not isinstance(payload, Mapping):
        raise ValueError(f"{path} holds a {type(payload).__name__}, expected the tensors of segment-anything by name")
    state = next((payload[key] for key in WRAPPERS if isinstance(payload.get(key), Mapping)), payload)
    anchor = next((key for key in state if str(key).endswith("image_encoder.pos_embed")), None)
    if anchor is None:
        raise ValueError(f"{path} {_foreign(state)}")
    prefix = anchor.removesuffix("image_encoder.pos_embed")
    named = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return {key: value.float() for key, value in named.items() if key.startswith(PARTS) and isinstance(value, Tensor)}


def _foreign(state: Mapping[Any, Any]) -> str:
    """What a file without SAM's encoder seems to be."""
    names = [str(key) for key in state]
    expected = f"expected vit_b, vit_l or vit_h of segment-anything, such as {PUBLISHED['']}"
    if any("image_encoder.trunk." in name for name in names):
        remedy = f"SAM 2 runs from a folder of transformers: 'hf download {PUBLISHED['sam2']} --local-dir sam2'"
        return f"is a checkpoint of SAM 2 in Meta's own form; {expected}. {remedy}"
    if any(name.startswith("image_encoder.") for name in names):
        return f"has another encoder than SAM's ViT (MobileSAM and the like); {expected}"
    some = ", ".join(names[:3]) or "nothing"
    return f"holds no SAM: it has {some}{' ...' if len(names) > 3 else ''}; {expected}"


def describe_encoder(state: Mapping[str, Tensor], path: Path) -> Shape:
    """Read the encoder's form off its tensors."""
    try:
        _, cells, _, width = state["image_encoder.pos_embed"].shape
        patch = state["image_encoder.patch_embed.proj.weight"].shape[-1]
        depth = 1 + max(int(key.split(".")[2]) for key in state if key.startswith("image_encoder.blocks."))
        reach = [state[f"image_encoder.blocks.{block}.attn.rel_pos_h"].shape for block in range(depth)]
        channels = state["image_encoder.neck.0.weight"].shape[0]
        windows = [(rows + 1) // 2 for rows, _ in reach if rows != 2 * cells - 1]
        whole = tuple(block for block, (rows, _) in enumerate(reach) if rows == 2 * cells - 1)
        heads = width // reach[0][1]
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise ValueError(
            f"{path} is not a whole checkpoint of segment-anything: {error} is missing or has another form; expected "
            f"one such as {PUBLISHED['']}: download it again"
        ) from error
    return Shape(width, depth, heads, patch, cells * patch, windows[0] if windows else 0, whole, channels)


def build_segment_anything(shape: Shape) -> Any:
    """A network of segment-anything without values, for load_state_dict with assign=True.

    Raises:
        ModuleNotFoundError: segment-anything is not installed.
    """
    try:
        from segment_anything import modeling
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"checkpoints of segment-anything need a package that is missing ({error.name}): "
            "pip install segment-anything"
        ) from error
    cells = shape.side // shape.patch
    with torch.device("meta"):
        model = modeling.Sam(
            image_encoder=modeling.ImageEncoderViT(
                img_size=shape.side,
                patch_size=shape.patch,
                embed_dim=shape.width,
                depth=shape.depth,
                num_heads=shape.heads,
                out_chans=shape.channels,
                norm_layer=partial(nn.LayerNorm, eps=1e-6),
                use_rel_pos=True,
                window_size=shape.window,
                global_attn_indexes=shape.whole,
            ),
            prompt_encoder=modeling.PromptEncoder(
                embed_dim=shape.channels,
                image_embedding_size=(cells, cells),
                input_image_size=(shape.side, shape.side),
                mask_in_chans=16,
            ),
            mask_decoder=modeling.MaskDecoder(
                transformer_dim=shape.channels,
                transformer=modeling.TwoWayTransformer(
                    depth=2, embedding_dim=shape.channels, num_heads=8, mlp_dim=2048
                ),
            ),
        )
    model.pixel_mean, model.pixel_std = torch.tensor(MEAN), torch.tensor(STD)  # not among the stored tensors
    return model


# ----------------------------------------------------------------------------------------------------------------------
# transformers


class TransformersSam:
    """SAM or SAM 2 of transformers; see sam_engine.Network."""

    def __init__(self, model: Any, path: Path, digest: str, device: torch.device) -> None:
        self.name, self.digest, self.device = str(path), digest, device
        self.model = model.to(device).eval()
        self.keep_ratio = model.config.model_type == "sam"
        self.side = int(model.config.prompt_encoder_config.image_size)
        self.mean, self.std = _channel_statistics(path)

    def encode(self, pixels: Tensor) -> list[Tensor]:
        features = self.model.get_image_embeddings(pixels)
        return [features] if isinstance(features, Tensor) else list(features)

    def decode(
        self, features: list[Tensor], boxes: Tensor | None, points: Tensor | None, labels: Tensor | None, several: bool
    ) -> tuple[Tensor, Tensor]:
        answers = self.model(
            image_embeddings=features[0] if self.keep_ratio else list(features),
            input_boxes=None if boxes is None else boxes[None],
            input_points=None if points is None else points[None],
            input_labels=None if labels is None else labels[None],
            multimask_output=several,
        )
        return answers.pred_masks[0], answers.iou_scores[0]


def _channel_statistics(folder: Path) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation of R, G, B for values of 0 to 255, from the folder or SAM's own."""
    path = folder / "preprocessor_config.json"
    facts = _read_json(path) if path.is_file() else {}
    mean, std = facts.get("image_mean"), facts.get("image_std")
    if isinstance(mean, list) and isinstance(std, list) and len(mean) == len(std) == 3:
        return [255 * float(number) for number in mean], [255 * float(number) for number in std]
    return MEAN, STD


def _read_json(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); expected a file that transformers saved") from error
    if not isinstance(facts, dict):
        raise ValueError(f"{path} holds a {type(facts).__name__}, expected an object of names and values")
    return facts


def _load_folder(path: Path, device: torch.device, wanted: str) -> TransformersSam:
    if not (path / "config.json").is_file():
        raise ValueError(
            f"{path} has no config.json; expected a folder of transformers with SAM or SAM 2, or a .pth file of "
            "segment-anything: name the file itself"
        )
    facts = _read_json(path / "config.json")
    kind = str(facts.get("model_type"))
    if kind not in FOLDERS:
        raise ValueError(f"{path} holds a model of the type {kind}, expected sam or sam2: name another folder")
    _check_type(_folder_type(kind, facts), wanted, path)
    model = _from_pretrained(path, FOLDERS[kind])
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()):
        if file.name == "config.json" or file.suffix in (".safetensors", ".bin"):
            with file.open("rb") as handle:
                digest.update(hashlib.file_digest(handle, "sha256").digest())
    return TransformersSam(model.requires_grad_(False), path, digest.hexdigest(), device)


def _folder_type(kind: str, facts: Mapping[str, Any]) -> str:
    if kind != "sam":
        return "sam2"
    vision = facts.get("vision_config") or {}
    width, depth = vision.get("hidden_size", 768), vision.get("num_hidden_layers", 12)
    return SIZES.get((width, depth), f"a ViT of width {width} and depth {depth}")


def _from_pretrained(path: Path, name: str) -> Any:
    """A model with all its weights from a folder."""
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path} is a folder of transformers, a package that is missing: pip install 'transformers>=5'"
        ) from error
    from safetensors import SafetensorError

    transformers.utils.logging.disable_progress_bar()
    try:
        model, loaded = getattr(transformers, name).from_pretrained(
            path, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
    except (*UNREADABLE, TypeError, SafetensorError) as error:
        raise ValueError(
            f"{path} could not be loaded as {name} of transformers: {error}; expected a whole folder with config.json "
            "and model.safetensors: download it again"
        ) from error
    lacking = sorted(map(str, [*loaded["missing_keys"], *loaded["mismatched_keys"]]))
    if lacking:
        raise ValueError(
            f"{path} lacks {len(lacking)} tensors of {name}, first {lacking[0]}; expected all: download it again"
        )
    return model
