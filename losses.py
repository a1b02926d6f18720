"""Losses from logits by name, alone or as weighted sums: "dice", "0.3*ce+0.7*dice", "tversky(alpha=0.3, beta=0.7)".

Every term is a function of sums over pixels. So the sums of several batches or processes can be added before
they are turned into a number, and the result is the loss of all of them together (Loss.sums, Loss.from_sums).
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from image_io import IGNORE_INDEX

LOSSES: dict[str, dict[str, float]] = {  # name -> its parameters and their defaults
    "dice": {},
    "jaccard": {},
    "tversky": {"alpha": 0.3, "beta": 0.7},
    "bce": {},
    "ce": {},
    "focal": {"gamma": 2.0},
}
PIXEL_LOSSES = ("bce", "ce", "focal")
SMOOTHED_LOSSES = ("bce", "ce")
_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_TERM = re.compile(rf"\s*(?:({_NUMBER})\s*\*\s*)?([A-Za-z_]\w*)\s*(?:\(([^()]*)\))?\s*(\+|$)")
_PARAMETER = re.compile(rf"\s*([A-Za-z_]\w*)\s*=\s*({_NUMBER})\s*")


@dataclass(frozen=True)
class Term:
    """One summand of a loss expression."""

    weight: float
    name: str
    parameters: dict[str, float]


def parse_loss(expression: str) -> list[Term]:
    """Read a sum of named losses.

    Args:
        expression: names joined by "+", each with an optional factor before it ("0.3*ce") and optional parameters
            after it ("focal(gamma=2)"). Case, underscores and a trailing "Loss" don't matter: "DiceLoss" is "dice".

    Raises:
        ValueError: not a sum of known losses, a parameter that the loss does not have, or a factor that is not
            positive.
    """
    terms, position = [], 0
    while True:
        match = _TERM.match(expression, position)
        if match is None:
            rest = expression[position:].strip()
            raise ValueError(f"loss {expression!r}: can't read {rest!r}. {_expected()}")
        factor, name, parameters, joint = match.groups()
        weight = float(factor) if factor is not None else 1.0
        if not (weight > 0 and math.isfinite(weight)):
            raise ValueError(f"loss {expression!r}: factor {factor} of {name!r} must be positive and finite")
        name = _canonical_name(expression, name)
        terms.append(Term(weight, name, _parse_parameters(expression, name, parameters)))
        position = match.end()
        if joint == "":
            return terms


def _expected() -> str:
    return (
        f"Losses: {', '.join(LOSSES)}. Write one name or a weighted sum, such as '0.3*ce+0.7*dice', "
        "'focal(gamma=2)' or 'tversky(alpha=0.3, beta=0.7)'"
    )


def _canonical_name(expression: str, name: str) -> str:
    short = name.lower().replace("_", "").removesuffix("loss")
    if short not in LOSSES:
        raise ValueError(f"loss {expression!r}: unknown name {name!r}. {_expected()}")
    return short


def _parse_parameters(expression: str, name: str, text: str | None) -> dict[str, float]:
    parameters = dict(LOSSES[name])
    for item in text.split(",") if text and text.strip() else ():
        match = _PARAMETER.fullmatch(item)
        if match is None or match[1] not in parameters:
            known = ", ".join(f"{key}={value:g}" for key, value in LOSSES[name].items()) or "none"
            raise ValueError(f"loss {expression!r}: can't use {item.strip()!r} in {name!r}. Its parameters: {known}")
        parameters[match[1]] = float(match[2])
    if name == "tversky" and not parameters["alpha"] + parameters["beta"] > 0:
        raise ValueError(f"loss {expression!r}: alpha + beta must be above 0, or every prediction is perfect")
    return parameters


def build_loss(
    expression: str, *, num_logits: int, class_weights: Tensor | None = None, label_smoothing: float = 0.0
) -> "Loss":
    """Make the loss that an expression such as "0.3*ce+0.7*dice" names.

    Args:
        expression: see parse_loss.
        num_logits: K of the network, 1 for binary (sigmoid), otherwise one per class (softmax).
        class_weights: (K,) or for K = 1 (2,): background, object; not negative. A pixel counts as much as the
            weight of its true class, in bce, ce and focal. Region losses count every class equally by themselves
            and don't use it.
        label_smoothing: share of the truth, 0 to 1 (not 1), that ce and bce spread evenly over all classes; of a binary
            network over background and object. Other terms don't use it.

    Raises:
        ValueError: unreadable expression, K out of range, weights or a smoothing that don't fit or that no term would
            use.
    """
    terms = parse_loss(expression)
    if not 1 <= num_logits < IGNORE_INDEX:
        raise ValueError(f"num_logits is {num_logits}, expected 1 to {IGNORE_INDEX - 1}: {IGNORE_INDEX} means ignored")
    if class_weights is not None:
        _check_weights(class_weights, max(2, num_logits))
        if not any(term.name in PIXEL_LOSSES for term in terms):
            raise ValueError(
                f"loss {expression!r} does not use class weights, only {', '.join(PIXEL_LOSSES)} do. "
                "Drop the weights or add such a term, as in '0.5*ce+0.5*dice'"
            )
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label smoothing is {label_smoothing:g}, expected 0 or more and less than 1")
    if label_smoothing and not any(term.name in SMOOTHED_LOSSES for term in terms):
        raise ValueError(
            f"loss {expression!r} does not use --label-smoothing, only {' and '.join(SMOOTHED_LOSSES)} do. Drop it or "
            "add such a term, as in '0.5*ce+0.5*dice'"
        )
    return Loss(terms, num_logits, class_weights, label_smoothing)


def _check_weights(class_weights: Tensor, num_classes: int) -> None:
    if class_weights.shape != (num_classes,):
        raise ValueError(f"class weights have shape {tuple(class_weights.shape)}, expected ({num_classes},)")
    usable = torch.isfinite(class_weights).all() and (class_weights >= 0).all() and class_weights.sum() > 0
    if not usable:
        raise ValueError(f"class weights {class_weights.tolist()} must be finite, not negative and not all 0")


class Loss:
    """A weighted sum of losses. Call it with logits (N, K, H, W) and a mask (N, H, W).

    The mask holds class indices (binary: 0 or 1) of any integer type; pixels with 255 are removed from everything:
    their logits may be anything, NaN too, and get a gradient of exactly 0. When every pixel is ignored the loss
    is 0 and still has its (zero) gradient. All arithmetic is float32 or wider, also inside autocast.
    """

    def __init__(
        self, terms: list[Term], num_logits: int, class_weights: Tensor | None, label_smoothing: float = 0.0
    ) -> None:
        self.terms = terms
        self.num_logits = num_logits
        self.class_weights = class_weights
        self.label_smoothing = label_smoothing

    def __call__(self, logits: Tensor, mask: Tensor) -> Tensor:
        """The loss of one batch, a scalar.

        Raises:
            ValueError: shapes that don't fit, or (checked on the CPU only) a class index out of range.
        """
        return self.from_sums(self.sums(logits, mask))

    def sums(self, logits: Tensor, mask: Tensor) -> Tensor:
        """What from_sums needs, (S,): add it over batches or processes (with gradients) for their common loss."""
        self._check(logits, mask)
        with torch.autocast(logits.device.type, enabled=False):
            if logits.dtype in (torch.float16, torch.bfloat16):
                logits = logits.float()
            mask = mask.long()
            keep = mask != IGNORE_INDEX  # (N, H, W)
            logits = logits.masked_fill(~keep[:, None], 0.0)
            mask = mask.masked_fill(~keep, 0)
            parts = []
            if any(term.name not in PIXEL_LOSSES for term in self.terms):
                parts.append(region_sums(logits, mask, keep))
            pixel_weights = self._pixel_weights(mask, keep, logits.dtype)
            for term in self.terms:
                if term.name in PIXEL_LOSSES:
                    if self.label_smoothing and term.name in SMOOTHED_LOSSES:
                        values = smoothed_cross_entropy(logits, mask, self.label_smoothing)  # (N, H, W)
                    else:
                        values = _pixel_losses(term, logits, mask)
                    values = values * pixel_weights
                    parts.append(torch.stack([values.sum(), pixel_weights.sum()]))
            return torch.cat(parts)

    def from_sums(self, sums: Tensor) -> Tensor:
        """Turn (added) sums (S,) into the loss, a scalar."""
        start = 0
        if any(term.name not in PIXEL_LOSSES for term in self.terms):
            start = 3 * self.num_logits + 1
        region, total = sums[:start], sums.new_zeros(())
        for term in self.terms:
            if term.name in PIXEL_LOSSES:
                value = sums[start] / sums[start + 1].clamp_min(1e-12)
                start += 2
            else:
                value = region_loss(region, **_tversky_weights(term))
            total = total + term.weight * value
        return total

    def _pixel_weights(self, mask: Tensor, keep: Tensor, dtype: torch.dtype) -> Tensor:
        if self.class_weights is None:
            return keep.to(dtype)
        return self.class_weights.to(device=mask.device, dtype=dtype)[mask] * keep

    def _check(self, logits: Tensor, mask: Tensor) -> None:
        if logits.ndim != 4 or logits.shape[1] != self.num_logits or not logits.is_floating_point():
            raise ValueError(
                f"logits are {logits.dtype} {tuple(logits.shape)}, expected floats (N, {self.num_logits}, H, W)"
            )
        n, _, height, width = logits.shape
        if mask.shape != (n, height, width) or mask.is_floating_point() or mask.is_complex():
            raise ValueError(
                f"mask is {mask.dtype} {tuple(mask.shape)}, expected class indices ({n}, {height}, {width}) to fit "
                f"logits {tuple(logits.shape)}"
            )
        if mask.device.type == "cpu" and mask.numel():  # elsewhere reading a value would stall the device
            num_classes = max(2, self.num_logits)
            bad = (mask != IGNORE_INDEX) & ((mask < 0) | (mask >= num_classes))
            if bad.any():
                raise ValueError(
                    f"mask holds class {int(mask[bad][0])}, expected 0 to {num_classes - 1} or {IGNORE_INDEX} (ignored)"
                )


def region_sums(logits: Tensor, mask: Tensor, keep: Tensor) -> Tensor:
    """Soft overlap, soft predicted area and true area of each class, then the number of kept pixels: (3 K + 1,).

    Args:
        logits: (N, K, H, W).
        mask: class indices (N, H, W), in range everywhere.
        keep: (N, H, W) bool, False = ignored.
    """
    if logits.shape[1] == 1:
        probs, truth = logits.sigmoid(), (mask == 1)[:, None]
    else:
        probs = logits.softmax(dim=1)
        truth = mask[:, None] == torch.arange(logits.shape[1], device=mask.device)[None, :, None, None]
    truth = (truth & keep[:, None]).to(probs.dtype)  # (N, K, H, W); float products are three times faster than bool
    counted = keep[:, None].to(probs.dtype)
    over = (0, 2, 3)
    overlap = (probs * truth).sum(dim=over)
    predicted = (probs * counted).sum(dim=over)
    return torch.cat([overlap, predicted, truth.sum(dim=over), counted.sum()[None]])


def region_loss(sums: Tensor, *, alpha: float, beta: float) -> Tensor:
    """One minus the mean Tversky index of the classes that occur; Dice is (0.5, 0.5), Jaccard (1, 1).

    Areas are summed over the whole batch before they are divided, per class, so an image without a class is no
    special case. A class that no pixel of the batch has would score 0 whatever is predicted, which only adds noise
    to the mean. Such classes are left out: in a softmax their false positives are already missing from the classes
    that are there. The one logit of a binary network has no such partner, so a batch without any object costs its
    mean object probability instead, and empty images still teach.

    Args:
        sums: (3 K + 1,) as region_sums gives them.
        alpha: weight of false positives.
        beta: weight of false negatives.

    Reference: Salehi et al. 2017, https://arxiv.org/abs/1706.05721
    """
    num_logits = (len(sums) - 1) // 3
    overlap, predicted, true = sums[:-1].reshape(3, num_logits)
    present = true > 0
    cost = overlap + alpha * (predicted - overlap) + beta * (true - overlap)
    losses = torch.where(present, 1 - overlap / cost.clamp_min(1e-7), 0.0)
    loss = losses.sum() / present.sum().clamp_min(1)
    if num_logits == 1:
        loss = loss + torch.where(present[0], 0.0, predicted[0] / sums[-1].clamp_min(1.0))
    return loss


def _tversky_weights(term: Term) -> dict[str, float]:
    fixed = {"dice": {"alpha": 0.5, "beta": 0.5}, "jaccard": {"alpha": 1.0, "beta": 1.0}}
    return fixed.get(term.name, term.parameters)


def _pixel_losses(term: Term, logits: Tensor, mask: Tensor) -> Tensor:
    """The loss of each pixel, (N, H, W); see cross_entropy and focal."""
    functions: dict[str, Callable[..., Tensor]] = {"bce": cross_entropy, "ce": cross_entropy, "focal": focal}
    return functions[term.name](logits, mask, **term.parameters)


def cross_entropy(logits: Tensor, mask: Tensor) -> Tensor:
    """Cross entropy of each pixel, (N, H, W): softmax over the classes, sigmoid of a single logit.

    One loss under both names, so that it always belongs to the probabilities that the network is used with.
    """
    if logits.shape[1] == 1:
        truth = (mask == 1).to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits[:, 0], truth, reduction="none")
    return F.cross_entropy(logits, mask, reduction="none")


def smoothed_cross_entropy(logits: Tensor, mask: Tensor, smoothing: float) -> Tensor:
    """Cross entropy of each pixel against a truth of which a share is spread over all K classes, (N, H, W).

    Class weights multiply it by the weight of the true class, as they do without smoothing. PyTorch weighs each class's
    part of the truth by itself: where objects are rare, the bit of object that smoothing puts into a background pixel
    then outweighs the background, and the loss is lowest for calling everything object. A single logit is that of two
    classes, the background's being 0.

    Reference: Szegedy et al. 2016, https://arxiv.org/abs/1512.00567
    """
    if logits.shape[1] == 1:
        logits = torch.cat([torch.zeros_like(logits), logits], dim=1)
    return F.cross_entropy(logits, mask, reduction="none", label_smoothing=smoothing)


def focal(logits: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Cross entropy of each pixel times (1 - probability of its true class) ** gamma, (N, H, W).

    The factor belongs to the pixel, not to the batch; gamma = 0 is cross entropy.

    Reference: Lin et al. 2017, https://arxiv.org/abs/1708.02002
    """
    entropy = cross_entropy(logits, mask)
    miss = -torch.expm1(-entropy)  # 1 - p, exact for p near 1
    return miss.clamp_min(1e-12) ** gamma * entropy
