"""Write checkpoints as the predecessor wrote them, with what its own chain answers; for tests/test_predecessor.py.

It needs the libraries of that time, so it runs in an environment of its own, and imports nothing of Tessera:
    python -m venv old && old/bin/pip install torch six opencv-python-headless timm==0.9.2 efficientnet-pytorch==0.7.1 \
        pretrainedmodels==0.7.4 segmentation-models-pytorch==0.3.3
    old/bin/python tests/make_predecessor_checkpoint.py FOLDER
    TESSERA_PREDECESSOR=FOLDER python -m pytest tests/test_predecessor.py
"""

import argparse
import json
from pathlib import Path

import cv2
import numpy as np
import segmentation_models_pytorch as smp
import torch
from segmentation_models_pytorch import utils as smp_utils

NETWORKS = {"unet": smp.Unet, "deeplabv3+": smp.DeepLabV3Plus}
IMAGES = 3
CASES = {
    "one-class": {"model": "unet", "encoder": "resnet18", "labels": [255], "side": 128},
    "one-class-module": {"model": "deeplabv3+", "encoder": "resnet18", "labels": [64], "side": 128, "module": True},
    "several": {"model": "unet", "encoder": "efficientnet-b0", "labels": [64, 128], "side": 128, "loss": "JaccardLoss"},
    "several-module": {
        "model": "deeplabv3+",
        "encoder": "efficientnet-b0",
        "labels": [128, 3, 64],
        "side": 512,
        "module": True,
        "numpy": True,
    },
    "extra": {"model": "unet", "encoder": "timm-regnetx_002", "labels": [255], "side": 96, "extras": ["nir"]},
    "extras-several": {
        "model": "deeplabv3+",
        "encoder": "mobilenet_v2",
        "labels": [1, 2],
        "side": 96,
        "extras": ["nir", "kv"],
        "module": True,
        "numpy": True,
        "scheduler": "ReduceLROnPlateau",
    },
    "old-archive": {"model": "unet", "encoder": "resnet18", "labels": [255], "side": 64, "archive": False},
}


def make_picture(rng: np.random.Generator, side: int, channels: int) -> np.ndarray:
    """Smooth spots, each channel with a brightness of its own, (side, side, channels) uint8."""
    noise = cv2.GaussianBlur(rng.normal(size=(side, side, channels)).astype(np.float32), (0, 0), side / 24)
    noise = noise.reshape(side, side, channels)
    noise /= noise.std((0, 1))
    levels = np.array([60.0, 110.0, 170.0, 90.0, 130.0])[:channels]
    return np.clip(noise * 30 + levels, 0, 255).astype(np.uint8)


def write_data(folder: Path, case: dict, rng: np.random.Generator) -> list[np.ndarray]:
    """Images with extra channels and masks; returns what the old chain had in memory: B G R extras."""
    side, extras, pictures = case["side"], case.get("extras", []), []
    values = np.array([0, *case["labels"], 7], np.uint8)  # 7 is a label that nobody learned
    for number in range(IMAGES):
        name = f"{number}.png"
        for part in ("images", "gt", *extras):
            (folder / part).mkdir(parents=True, exist_ok=True)
        picture = make_picture(rng, side, 3 + len(extras))
        cv2.imwrite(str(folder / "images" / name), picture[..., :3])
        for place, extra in enumerate(extras):
            cv2.imwrite(str(folder / extra / name), picture[..., 3 + place])
        bands = make_picture(rng, side, 1)[..., 0].astype(int)
        cv2.imwrite(str(folder / "gt" / name), values[np.clip(bands // 20, 0, 10**6) % len(values)])
        read = cv2.imread(str(folder / "images" / name), cv2.IMREAD_UNCHANGED)
        layers = [cv2.imread(str(folder / extra / name), cv2.IMREAD_UNCHANGED) for extra in extras]
        pictures.append(np.dstack([read, *layers]).astype(np.float32) if extras else read)
    return pictures


def build_network(case: dict, batch: torch.Tensor) -> torch.nn.Module:
    """A network of random weights with varied statistics, whose answers spread over 0 to 1."""
    outputs = 1 if len(case["labels"]) == 1 else len(case["labels"]) + 1
    network = NETWORKS[case["model"]](
        case["encoder"],
        encoder_weights=None,
        in_channels=batch.shape[1],
        classes=outputs,
        activation="sigmoid",
    )
    generator = torch.Generator().manual_seed(1)
    for name, weight in network.named_parameters():
        if weight.ndim == 1:
            low = 0.75 if name.endswith("weight") else -0.25
            weight.data = torch.rand(weight.shape, generator=generator) * 0.5 + low
    network.train()
    with torch.no_grad():
        for _ in range(4):  # statistics of these very images, so that nothing dies out
            network(batch)
    for name, buffer in network.named_buffers():
        if name.endswith("running_mean"):
            buffer += torch.randn(buffer.shape, generator=generator) * 0.1
        elif name.endswith("running_var"):
            buffer *= torch.rand(buffer.shape, generator=generator) + 0.5
    head = network.segmentation_head
    with torch.no_grad():
        logits = torch.logit(network.eval()(batch), eps=1e-6)
        scale = 2 / logits.std(dim=(0, 2, 3))
        head[0].weight *= scale[:, None, None, None]
        head[0].bias.copy_((head[0].bias - logits.mean(dim=(0, 2, 3))) * scale)
    return network


def train_a_step(network: torch.nn.Module, case: dict, batch: torch.Tensor) -> dict:
    """Loss, optimiser and scheduler as they are pickled after an epoch; the network's weights stay."""
    before = {key: value.clone() for key, value in network.state_dict().items()}
    loss = getattr(smp_utils.losses, case.get("loss", "DiceLoss"))()
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-3)
    name = case.get("scheduler", "CosineAnnealingLR")
    options = {"T_max": 50, "eta_min": 0} if name == "CosineAnnealingLR" else {}
    scheduler = getattr(torch.optim.lr_scheduler, name)(optimiser, **options)
    probs = network.train()(batch)
    value = loss(probs, (probs > 0.5).float())
    value.backward()
    optimiser.step()
    scheduler.step(*([] if options else [value.detach().numpy()[()]]))
    network.load_state_dict(before)
    network.eval()
    return {
        "optimizer_name": "Adam",
        "optimizer_state_dict": optimiser.state_dict(),
        "scheduler_state_dict": scheduler.state_dict(),
        "loss": loss,
    }


def old_iou(probs: np.ndarray, mask: np.ndarray, labels: list[int]) -> np.ndarray:
    """Pixels (3, K) of each class in truth and prediction, in either, and in truth; background last of several."""
    if len(probs) == 1:
        truth, found = [mask == labels[0]], [probs[0] >= 0.5]
    else:
        known = [mask == label for label in labels]
        truth = [*known, ~np.any(known, axis=0)]
        largest = probs.argmax(0)
        found = [largest == place for place in range(len(probs))]
    pairs = list(zip(truth, found, strict=True))
    return np.array([[(t & f).sum() for t, f in pairs], [(t | f).sum() for t, f in pairs], [t.sum() for t, _ in pairs]])


def write_case(root: Path, name: str, case: dict) -> None:
    """One run folder with its data set, and what the old chain answers."""
    rng = np.random.default_rng(sum(map(ord, name)))
    folder, data = root / name, root / name / "data" / "val"
    pictures = write_data(data, case, rng)
    stack = np.stack(pictures).astype(np.float64)
    mean, std = stack.mean((0, 1, 2)), np.sqrt(stack.var((1, 2)).mean(0))

    def prepare(picture: np.ndarray) -> np.ndarray:
        picture = cv2.resize(picture, (case["side"], case["side"]), interpolation=cv2.INTER_LINEAR)
        return ((picture.astype(np.float32) - mean.astype(np.float32)) / std.astype(np.float32)).transpose(2, 0, 1)

    batch = torch.from_numpy(np.stack([prepare(picture) for picture in pictures]))
    network = build_network(case, batch)
    rest = train_a_step(network, case, batch)
    wrapped = torch.nn.DataParallel(network) if case.get("module") else network
    saved = {
        "epoch": 7,
        "model_state_dict": wrapped.state_dict(),
        **rest,
        "model_name": case["model"],
        "encoder_name": case["encoder"],
        "encoder_weights": "imagenet",
        "activation": "sigmoid",
        "max_score": np.float64(0.75) if case.get("numpy") else 0.75,
        "mean_var": {"mean": mean, "std": std} if case.get("numpy") else {"mean": mean.tolist(), "std": std.tolist()},
        "class_list": case["labels"],
        "add_dirs": case.get("extras"),
        "device": "cuda" if case.get("module") else "cpu",
    }
    for file in (f"{name}.pth", "last_checkpoint"):
        torch.save(saved, folder / file, _use_new_zipfile_serialization=case.get("archive", True))
    with torch.no_grad():
        probs = np.concatenate([network(image[None]).numpy() for image in batch])
        larger = [cv2.resize(picture, None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST) for picture in pictures]
        shrunk = np.concatenate([network(torch.from_numpy(prepare(picture))[None]).numpy() for picture in larger])
        exact = np.concatenate([network.double()(image[None].double()).numpy() for image in batch])  # without rounding
    masks = [cv2.imread(str(data / "gt" / f"{number}.png"), cv2.IMREAD_GRAYSCALE) for number in range(IMAGES)]
    counts = sum(old_iou(p, m, case["labels"]) for p, m in zip(probs, masks, strict=True))
    np.savez(folder / "old.npz", probs=probs, exact=exact, shrunk=shrunk, iou=counts[0] / counts[1])
    (folder / "case.json").write_text(json.dumps(case))
    print(name, "deviation", probs.std().round(3), "IoU", (counts[0] / counts[1]).round(4))  # noqa: T201


def main() -> None:
    """Write every case."""
    parser = argparse.ArgumentParser(description="Write checkpoints as the predecessor wrote them.")
    parser.add_argument("folder", type=Path, help="where they go")
    folder = parser.parse_args().folder
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for name, case in CASES.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        write_case(folder, name, case)


if __name__ == "__main__":
    main()
