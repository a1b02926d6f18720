"""What the training loop costs beside forward, backward and step: the ratio that design keeps under 1.05.

The same network, batch and optimiser run twice, in turns: bare (forward, loss, backward, step) and through
trainer.train_one_epoch with everything that it counts, checks and shows. Tensors are in memory, so the loader is out.

Example:
    python -m benchmarks.train_step
"""

import argparse
import copy
import gc
import statistics
import time
from collections.abc import Callable, Sequence

import torch

import cli
from dataset import Batch
from learner import FitOptions, Learner, build_learner
from losses import build_loss
from model import build_model, count_parameters
from networks.single_values import tolerate_single_values
from trainer import train_one_epoch


def build_parser() -> argparse.ArgumentParser:
    """Flags of this benchmark."""
    parser = cli.make_parser("Ratio of the training loop to bare forward, backward and step.")
    parser.add_argument("-m", "--model", default="deeplabv3+", metavar="NAME", help="architecture")
    parser.add_argument("--encoder", default="efficientnet-b0", metavar="NAME", help="encoder")
    parser.add_argument("--size", type=cli.positive_int, default=256, metavar="S", help="side of the images")
    parser.add_argument("--steps", type=cli.positive_int, default=4, metavar="N", help="steps in one turn")
    parser.add_argument("--rounds", type=cli.positive_int, default=7, metavar="N", help="turns of each; medians count")
    cli.add_run_args(parser, batch=8)
    return parser


def random_batches(steps: int, batch: int, size: int) -> list[Batch]:
    """Batches of noise with half of the pixels labelled."""
    generator = torch.Generator().manual_seed(0)
    return [
        Batch(
            torch.randn(batch, 3, size, size, generator=generator),
            torch.randint(0, 2, (batch, size, size), generator=generator, dtype=torch.uint8),
            tuple(f"image{i}" for i in range(batch)),
        )
        for _ in range(steps)
    ]


def bare_epoch(learner: Learner, batches: Sequence[Batch], loss: Callable[..., torch.Tensor]) -> None:
    """The floor: nothing but moving the batch, forward, loss, backward and step."""
    device = learner.accelerator.device
    learner.model.train()
    for batch in batches:
        images = batch.images.to(device, memory_format=torch.channels_last)
        value = loss(learner.model(images), batch.masks.to(device).long())
        value.backward()
        learner.optimiser.step()
        learner.optimiser.zero_grad(set_to_none=True)


def seconds(work: Callable[[], object], device: str) -> float:
    """Wall seconds of one call, the device's queue included."""
    gc.collect()
    begin = time.perf_counter()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def main(argv: Sequence[str] | None = None) -> None:
    """Parse and measure."""
    parser = build_parser()
    args = cli.parse(parser, argv)
    with cli.plain_errors(parser):
        measure(args, cli.pick_device(args.device, args.cpu))


def measure(args: argparse.Namespace, device: str) -> None:
    """Time both in turns and print the table."""
    torch.manual_seed(args.seed)
    network = build_model(args.model, args.encoder, in_channels=3, num_logits=1)
    tolerate_single_values(network)
    options, loss = FitOptions(epochs=1), build_loss("dice", num_logits=1)
    bare, looped = (
        build_learner(net, options, device=device, steps=args.steps) for net in (copy.deepcopy(network), network)
    )
    batches = random_batches(args.steps, args.batch, args.size)
    bare_epoch(bare, batches, loss)
    train_one_epoch(looped, batches, loss, options, 1)
    floor, ours = [], []
    for _ in range(args.rounds):
        floor.append(seconds(lambda: bare_epoch(bare, batches, loss), device))
        ours.append(seconds(lambda: train_one_epoch(looped, batches, loss, options, 1), device))
    ratios = [own / base for own, base in zip(ours, floor, strict=True)]
    print(f"{args.model} {args.encoder}, {count_parameters(network) / 1e6:.1f} M parameters, {device}")
    print(
        f"batch {args.batch} of {args.size} px, {torch.get_num_threads()} threads, "
        f"{args.rounds} turns of {args.steps} steps"
    )
    print(f"{'forward + backward + step':<28}{statistics.median(floor) / args.steps:>9.3f} s a step")
    print(f"{'train_one_epoch':<28}{statistics.median(ours) / args.steps:>9.3f} s a step")
    print(f"{'ratio':<28}{statistics.median(ratios):>9.3f}   ({min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()
