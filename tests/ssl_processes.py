"""What the tests of gathered statistics compute in one process, and, run as a program, in two.

    python tests/ssl_processes.py FOLDER

forks two processes that meet through a file in the folder and leave FOLDER/RANK.pt there.
"""

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gathering import GatheredBatchNorm, gather_over, gather_statistics, sum_over
from selfsupervised.encoders import build_encoder
from selfsupervised.interface import METHODS, MethodOptions
from selfsupervised.methods import build_method

BATCH, SIDE, STEPS = 8, 32, 3
OPTIONS = MethodOptions(
    projector=(12, 8), lambda_=0.02, momentum=0.9, queue=20, points=6, local_projector=(10, 6), batch=BATCH
)


def rows(values, rank, world):
    share = len(values) // world
    return values[rank * share : (rank + 1) * share]


def make_views(seed):
    """Two views of a batch in float64, and where they lie: shifted, and the last pair without overlap."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.3, 2, BATCH).double()[:, None, None, None]
    a, b = (torch.randn(BATCH, 3, SIDE, SIDE, generator=generator).double() * scale + scale for _ in "ab")
    places = torch.eye(2, 3).double().expand(BATCH, 2, 2, 3).clone()
    places[:, :, :, 2] = torch.randint(0, 12, (BATCH, 2, 2), generator=generator).double()
    places[-1, 0, 0, 2] = 1000
    return a, b, places


def learn(name, rank=0, world=1, *, encoder="plain-8", gathered=True):
    """Gradient of the first step and state after a few, as plain dicts of tensors."""
    torch.manual_seed(0)
    network = build_encoder("tu-test_vit" if name == "mae" else encoder, 3)
    for key, weight in network.named_parameters():
        weight.requires_grad_(not key.startswith("model.head."))  # classes, which no feature depends on
    if gathered:
        gather_statistics(network)
    method = build_method(name, network, OPTIONS).double().train()
    for step in range(method.warm_steps):
        method.warm(*(rows(view, rank, world) for view in make_views(100 + step)[:2]))
    model = nn.parallel.DistributedDataParallel(method, broadcast_buffers=False) if world > 1 else method
    optimiser = torch.optim.SGD([w for w in method.parameters() if w.requires_grad], lr=0.01, momentum=0.9)
    result = {"warm": {key: value.clone() for key, value in method.state_dict().items()}}
    for step in range(STEPS):
        optimiser.zero_grad()
        answer = model(*(rows(values, rank, world) for values in make_views(step)))
        answer.loss.backward()
        if step == 0:
            result["gradient"] = {n: w.grad.clone() for n, w in method.named_parameters() if w.grad is not None}
            result["loss"] = {"": answer.loss.detach()}
        optimiser.step()
        method.after_step(step / STEPS)
    result["state"] = {key: value.clone() for key, value in method.state_dict().items()}
    return result


def small_network(rank=0, world=1):
    """Gathered values in the middle of a network and at its end; the mean over processes of what they minimise."""
    generator = torch.Generator().manual_seed(1)
    first, second, images = (torch.randn(*shape, generator=generator).double() for shape in ((5, 4), (4, 3), (8, 5)))
    first.requires_grad_()
    second.requires_grad_()
    own = rows(images, rank, world)
    hidden = torch.tanh(own @ first)
    hidden = hidden * sum_over(hidden.square().sum(0)) + gather_over(hidden).prod(0)  # in the middle
    answers = hidden @ second
    per_row = answers.sin().sum(1).mean()  # of the own rows
    of_all = (gather_over(answers).T @ sum_over(answers.sum(0, keepdim=True)).expand(8, 3)).square().mean()
    (per_row + of_all).backward()
    order = gather_over(torch.arange(8).view(8, 1)[rank * len(own) :][: len(own)].double())
    return {"first": first.grad, "second": second.grad, "order": order}


def normalise(rank=0, world=1, *, layer=GatheredBatchNorm):
    """Two batches through one layer of batch normalisation, for 4-D, 2-D and cumulative statistics."""
    result = {}
    for name, shape, momentum in (("maps", (8, 3, 4, 5), 0.1), ("rows", (8, 3), 0.3), ("mean", (8, 3, 2, 2), None)):
        torch.manual_seed(3)
        kind = layer or (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)
        norm = kind(3, momentum=momentum).double()
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        for _ in range(2):
            values = (torch.randn(shape).double() * 3 + 50 + torch.arange(8).view(8, *[1] * (len(shape) - 1))).detach()
            own = rows(values, rank, world).clone().requires_grad_()
            target = rows(torch.randn(shape).double(), rank, world)
            out = norm(own)
            out.sub(target).pow(3).sum().backward()
        result |= {f"{name} out": gather_over(out.detach()), f"{name} input": gather_over(own.grad)}
        result |= {f"{name} weight": sum_over(norm.weight.grad), f"{name} bias": sum_over(norm.bias.grad)}
        result |= {f"{name} {key}": value.clone() for key, value in norm.state_dict().items()}
    return result


def in_two(rank, folder):
    limit = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2, timeout=limit)
    result = {name: learn(name, rank, 2) for name in METHODS}
    result |= {f"{name} groups": learn(name, rank, 2, encoder="plain-8-gn", gathered=False) for name in METHODS}
    result |= {f"{name} alone": learn(name, rank, 2, gathered=False) for name in ("barlow", "moco")}
    network = small_network(rank, 2)
    for name in ("first", "second"):
        network[name] = sum_over(network[name]) / 2  # what DDP does
    result["network"], result["norm"] = network, normalise(rank, 2)
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def main(folder):
    torch.set_num_threads(1)
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                in_two(rank, folder)
                status = 0
            finally:
                if status:
                    import traceback

                    traceback.print_exc()
                sys.stderr.flush()
                os._exit(status)
        children.append(child)
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))


if __name__ == "__main__":
    main(sys.argv[1])
