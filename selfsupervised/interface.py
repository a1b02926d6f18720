"""What the training loop knows of a method: its options, one forward, what comes after a step."""

from dataclasses import dataclass, field

from torch import Tensor, nn

METHODS = ("barlow", "moco", "mocov3", "dense", "mae")


@dataclass(frozen=True)
class MethodOptions:
    """Settings of the methods; each uses those that it has.

    projector: widths of the layers after the pooled features, empty for the method's own (see DEFAULT_PROJECTORS).
    lambda_: weight of the off-diagonal correlations of Barlow Twins. temperature: what similarities are divided by.
    momentum: share of the teacher that stays at each step; moco's is constant, mocov3's rises to 1.
    queue: keys of earlier batches, see choose_queue. points: places compared in a pair by `dense`.
    local_projector: widths after the features of a place. global_weight: share of the global loss in that of `dense`.
    mask_share: of the patches, what `mae` hides. batch: images of all processes in one step. side: of a view, in
    pixels; 0: not known.
    """

    projector: tuple[int, ...] = ()
    lambda_: float = 0.005
    temperature: float = 0.2
    momentum: float = 0.99
    queue: int = 4096
    points: int = 32
    local_projector: tuple[int, ...] = (256, 256)
    global_weight: float = 0.5
    mask_share: float = 0.75
    batch: int = 64
    side: int = 0


@dataclass
class Step:
    """What a method says about one batch.

    loss: a scalar in float32. embeddings: (N, D), the projector's output for view_a of this process, detached and
    before any normalisation. scores: scalars for the log, detached.
    """

    loss: Tensor
    embeddings: Tensor
    scores: dict[str, Tensor] = field(default_factory=dict)


class Method(nn.Module):
    """A way of learning from two views of each image.

    All state, such as a teacher or a queue, is in parameters and buffers, so that the state dict resumes exactly.

    accumulates: whether gradients of several smaller batches add up to that of one; why_not says why they do not.
    warm_steps: batches for `warm` before the first step.
    """

    encoder: nn.Module
    accumulates: bool = True
    why_not: str = ""
    warm_steps: int = 0

    def forward(self, view_a: Tensor, view_b: Tensor, places: Tensor) -> Step:
        """Compare two views.

        Args:
            view_a: (N, C, S, S), the same N in all processes.
            view_b: the other view of each image.
            places: (N, 2, 2, 3), matrices that take a pixel (x, y, 1) of view a and b to its place in the image;
                centres of pixels are at integers.
        """
        raise NotImplementedError

    def warm(self, view_a: Tensor, view_b: Tensor) -> None:
        """Fill a queue or statistics from a batch, without learning; the method is in training mode."""

    def complete(self, images: Tensor) -> dict[str, Tensor]:
        """What the method makes of images (N, C, H, W), to look at: images of the same shape by name; none here."""
        return {}

    def after_step(self, done: float) -> None:
        """What follows an optimiser step.

        Args:
            done: share of the run that is over, 0 to 1.
        """
