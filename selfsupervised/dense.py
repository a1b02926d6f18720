"""Dense Barlow Twins: features of the same place in both views correlate, at all scales of the encoder.

A vector for a whole image says little about where things are, which a segmentation network must know. Here each pair
gives many samples: places that both views show, found through the geometry of the views.

References:
    - Zbontar et al. 2021, Barlow Twins: https://arxiv.org/abs/2103.03230
    - Pinheiro et al. 2020, View-agnostic dense representations (matching places): https://arxiv.org/abs/2011.05499
    - Hariharan et al. 2015, Hypercolumns (features of a place at all scales): https://arxiv.org/abs/1411.5752
    - Roberts 2018, the R2 sequence: https://extremelearning.com.au/unreasonable-effectiveness-of-quasirandom-sequences
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from gathering import in_full, sum_over
from selfsupervised.barlow_twins import WHY_NOT, barlow_loss
from selfsupervised.encoders import feature_maps
from selfsupervised.heads import build_head, pool
from selfsupervised.interface import Method, MethodOptions, Step

STRIDE = 4  # finer maps are brought to it by averaging
TRIED = 4  # places looked at for each that is used: the overlap of turned views does not fill its box
PLASTIC = 1.324717957244746  # root of x^3 = x + 1, which the R2 sequence is built on


class DenseBarlowTwins(Method):
    """Barlow Twins over places and over images, as a weighted sum of the losses per unit.

    The features of a place are sampled from every map, brought to one width by a linear layer each, and added: what
    1x1 convolutions of all maps at stride 4 would give there, at the cost of a few places. Both views go through the
    network together, as in BarlowTwins.

    Args:
        channels: of the encoder's maps, finest first.
        projector: widths of the projector of whole images.
    """

    accumulates, why_not = False, WHY_NOT

    def __init__(
        self, encoder: nn.Module, channels: Sequence[int], projector: Sequence[int], options: MethodOptions
    ) -> None:
        super().__init__()
        self.encoder, self.lambda_ = encoder, options.lambda_
        self.points, self.global_weight = options.points, options.global_weight
        self.projector = build_head(channels[-1], projector)
        width = options.local_projector[0]
        # What follows would undo biases here and take over weights of the normalisation.
        self.laterals = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(each, elementwise_affine=False), nn.Linear(each, width, bias=False))
            for each in channels
        )
        self.local_projector = build_head(width, options.local_projector)

    def forward(self, view_a: Tensor, view_b: Tensor, places: Tensor) -> Step:
        """See Method.forward."""
        maps = feature_maps(self.encoder, torch.cat((view_a, view_b)))
        z_a, z_b = in_full(self.projector(pool(maps))).chunk(2)
        overall, scores = barlow_loss(z_a, z_b, self.lambda_)

        with torch.autocast(view_a.device.type, enabled=False):
            points_a, points_b, shared = match_points(places, view_a.shape[-2:], self.points)
            sampled = sample_maps(maps, torch.cat((points_a, points_b)), view_a.shape[-2:])
        joined = sum(lateral(values) for lateral, values in zip(self.laterals, sampled, strict=True))  # (2 N, P, D)
        local_a, local_b = in_full(self.local_projector(joined.flatten(0, 1))).chunk(2)  # (N * P, D)
        local, local_scores = barlow_loss(local_a, local_b, self.lambda_, shared.flatten().to(local_a))

        overall, local = overall / z_a.shape[1], local / local_a.shape[1]
        loss = self.global_weight * overall + (1 - self.global_weight) * local
        scores |= {f"local {name}": value for name, value in local_scores.items()}
        scores |= {"local loss": local.detach(), "global loss": overall.detach(), "shared": share_of(shared)}
        return Step(loss, z_a.detach(), scores)


def match_points(places: Tensor, size: Sequence[int], count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Places that both views of a pair show.

    They are the same pattern for every pair, stretched over the part of view a that holds the overlap: the views are
    random already, and processes that share a batch need no common random numbers.

    Args:
        places: (N, 2, 2, 3), see Method.forward. size: height and width of the views. count: P.

    Returns:
        Pixels (x, y) in view a and in view b, both (N, P, 2), and which of them lie in both views, (N, P) bool.
        Pairs without overlap have none.
    """
    height, width = size
    matrices = in_full(places)
    turn_a, turn_b = matrices[:, 0, :, :2], matrices[:, 1, :, :2]
    shift = matrices[:, 0, :, 2] - matrices[:, 1, :, 2]  # first: positions in a large image lose digits
    to_b = torch.linalg.solve(turn_b, torch.cat((turn_a, shift[..., None]), dim=2))  # (N, 2, 3), from a to b
    to_a = torch.linalg.solve(turn_a, torch.cat((turn_b, -shift[..., None]), dim=2))

    low, high = matrices.new_tensor((-0.5, -0.5)), matrices.new_tensor((width - 0.5, height - 0.5))
    corners = torch.stack((low, torch.stack((high[0], low[1])), high, torch.stack((low[0], high[1]))))
    seen = _move(corners.expand(len(places), 4, 2), to_a)  # view b's corners in view a
    begin, end = seen.amin(1).maximum(low), seen.amax(1).minimum(high)  # (N, 2)
    points_a = begin[:, None] + _spread(TRIED * count, matrices) * (end - begin)[:, None]
    points_b = _move(points_a, to_b)
    inside = ((points_b >= low) & (points_b <= high)).all(2) & (end > begin).all(1)[:, None]
    first = (~inside).byte().argsort(dim=1, stable=True)[:, :count]  # those inside, in their order, then others
    chosen = first[..., None].expand(-1, -1, 2)
    return points_a.gather(1, chosen), points_b.gather(1, chosen), inside.gather(1, first)


def _move(points: Tensor, matrices: Tensor) -> Tensor:
    """Points (N, P, 2) by matrices (N, 2, 3)."""
    return points @ matrices[:, :, :2].mT + matrices[:, None, :, 2]


def _spread(count: int, like: Tensor) -> Tensor:
    """Points of the unit square that cover it evenly, whatever their number: the R2 sequence, (count, 2)."""
    steps = torch.arange(count, device=like.device, dtype=like.dtype)[:, None]
    return (0.5 + steps * like.new_tensor((1 / PLASTIC, 1 / PLASTIC**2))) % 1


def sample_maps(maps: Sequence[Tensor], points: Tensor, size: Sequence[int]) -> list[Tensor]:
    """Features of places, interpolated: of maps (N, C_i, h_i, w_i) at pixels (N, P, 2) -> (N, P, C_i) each.

    Args:
        points: (x, y) in pixels of the image; those outside of it take the features at its border.
        size: height and width of the image.
    """
    height, width = size
    grid = (2 * points + 1) / points.new_tensor((width, height)) - 1  # -1 and 1 are the outer edges
    sampled = []
    for values in maps:
        finer = STRIDE * values.shape[-1] // width
        if finer > 1:
            values = functional.avg_pool2d(values, finer)
        found = functional.grid_sample(
            in_full(values), grid[:, :, None].to(in_full(values)), padding_mode="border", align_corners=False
        )
        sampled.append(found[..., 0].mT)  # (N, C_i, P, 1) -> (N, P, C_i)
    return sampled


def share_of(shared: Tensor) -> Tensor:
    """Share of the places of all processes that lie in both views."""
    counts = torch.stack((shared.sum(), shared.new_full((), shared.numel(), dtype=torch.long)))
    total = sum_over(counts)
    return total[0] / total[1]
