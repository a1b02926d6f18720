"""What a step of pretraining costs beside lightly's Barlow Twins with the same encoder and projector.

All take turns on the same batch in memory, so the views are out. lightly's is built as its documentation shows: one
view after the other through encoder and projection head, then its loss. The other methods stand below for comparison.
On a CPU ratios are of processor time, which other programs change less than the wall's.

Example:
    python -m benchmarks.pretrain_step --turns 5
"""

import argparse
import copy
import gc
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import cli
from optim import build_optimiser
from selfsupervised.encoders import build_encoder, feature_channels
from selfsupervised.heads import pooled_features
from selfsupervised.interface import METHODS, Method, MethodOptions
from selfsupervised.methods import build_method

UNITS = 1024
COMPARED = [name for name in METHODS if name != "mae"]  # which takes other encoders


def build_parser() -> argparse.ArgumentParser:
    """Flags of this benchmark."""
    parser = cli.make_parser("Milliseconds of a step of each method beside lightly's Barlow Twins.")
    parser.add_argument("--encoder", default="resnet18", metavar="NAME", help="encoder")
    parser.add_argument("--size", type=cli.positive_int, default=128, metavar="S", help="side of the views")
    parser.add_argument("--turns", type=cli.positive_int, default=5, metavar="N", help="steps of each; medians count")
    parser.add_argument("--amp", action="store_true", help="bfloat16 in forward passes")
    cli.add_run_args(parser, batch=32)
    return parser


class LightlyBarlow(nn.Module):
    """Barlow Twins of lightly's parts around an encoder."""

    def __init__(self, encoder: nn.Module, features: int) -> None:
        super().__init__()
        from lightly.loss import BarlowTwinsLoss
        from lightly.models.modules import BarlowTwinsProjectionHead

        self.encoder = encoder
        self.head = BarlowTwinsProjectionHead(features, UNITS, UNITS)
        self.criterion = BarlowTwinsLoss(gather_distributed=False)

    def forward(self, view_a: Tensor, view_b: Tensor) -> Tensor:
        """The loss of two views."""
        z_a, z_b = (self.head(pooled_features(self.encoder, view)) for view in (view_a, view_b))
        loss: Tensor = self.criterion(z_a, z_b)
        return loss


def make_step(model: nn.Module, views: Sequence[Tensor], args: argparse.Namespace, device: str) -> Callable[[], None]:
    """One whole step: forward, backward, optimiser, and what a method of ours does afterwards."""
    model.train()
    places = torch.eye(2, 3, device=device).expand(args.batch, 2, 2, 3).contiguous()
    optimiser = build_optimiser("SGD", model, lr=1e-3, weight_decay=1e-4, momentum=0.9)

    def step() -> None:
        with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=args.amp):
            loss = model(*views, places).loss if isinstance(model, Method) else model(*views)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if isinstance(model, Method):
            model.after_step(0.5)

    return step


def make_steps(args: argparse.Namespace, device: str) -> dict[str, Callable[[], None]]:
    """The steps to compare, by the names of their rows."""
    encoder = build_encoder(args.encoder, 3)
    features, options = feature_channels(encoder, 3)[-1], MethodOptions(batch=args.batch)
    views = [torch.randn(args.batch, 3, args.size, args.size, device=device) for _ in "ab"]
    steps = {}
    for name in ("lightly", "lightly, channels last", *COMPARED):
        own, layout = copy.deepcopy(encoder), torch.contiguous_format if name == "lightly" else torch.channels_last
        model = build_method(name, own, options) if name in COMPARED else LightlyBarlow(own, features)
        laid = [view.contiguous(memory_format=layout) for view in views]
        steps[name] = make_step(model.to(device).to(memory_format=layout), laid, args, device)  # type: ignore[call-overload]
    return steps


def time_step(step: Callable[[], None], device: str) -> tuple[float, float]:
    """Seconds of a step: of the wall, the device's queue included, and of the processor (a GPU's: of the wall)."""
    gc.collect()
    begin, busy = time.perf_counter(), time.process_time()
    step()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    wall = time.perf_counter() - begin
    return wall, time.process_time() - busy if device == "cpu" else wall


def main(argv: Sequence[str] | None = None) -> None:
    """Parse and measure."""
    parser = build_parser()
    args = cli.parse(parser, argv)
    with cli.plain_errors(parser):
        measure(args, cli.pick_device(args.device, args.cpu))


def measure(args: argparse.Namespace, device: str) -> None:
    """Time all in turns and print the table."""
    torch.manual_seed(args.seed)
    steps = make_steps(args, device)
    for step in steps.values():
        step()
    wall: dict[str, list[float]] = {name: [] for name in steps}
    used: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.turns):
        for name, step in steps.items():
            for seconds, kept in zip(time_step(step, device), (wall, used), strict=True):
                kept[name].append(seconds)
    print(
        f"{args.encoder}, {args.batch} pairs of {args.size} px, projector {UNITS}-{UNITS}-{UNITS}, {device}, "
        f"{torch.get_num_threads()} threads, {args.turns} turns"
    )
    print(f"{'a step':<28}{'wall':>10}{'processor':>12}{'to lightly':>12}")
    for name in steps:
        ratio = statistics.median(own / base for own, base in zip(used[name], used["lightly"], strict=True))
        title = f"{name} (Barlow Twins)" if name == "lightly" else name
        medians = (1000 * statistics.median(values[name]) for values in (wall, used))
        print(f"{title:<28}{next(medians):>7.0f} ms{next(medians):>9.0f} ms{ratio:>12.2f}")


if __name__ == "__main__":
    main()
