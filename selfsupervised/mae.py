"""Masked autoencoding: a vision transformer sees a quarter of the patches, and a small decoder guesses the others.

What it learns needs no choice of what views may change, and no other images: every view of a pair is an image of its
own. The encoder never meets a masked patch, so a step costs less than one of the other methods.

Reference: He et al. 2021, Masked autoencoders are scalable vision learners: https://arxiv.org/abs/2111.06377
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import PatchEmbed, build_sincos2d_pos_embed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from gathering import in_full
from selfsupervised.interface import Method, MethodOptions, Step

BLOCKS, WIDTH, HEADS = 4, 256, 8  # of the decoder; the paper's table 1 finds little between 1 and 12, 128 and 1024
# Added to the variances of patches, in units of the images' own variance; 1e-6 in the paper. What is empty in a
# microscope's picture has noise of a grey level or so, which would be made as loud as objects.
FLOOR = 1e-2
WORD = 0xFFFFFFFF


class MaskedAutoencoder(Method):
    """A vision transformer of timm and a decoder of pixels.

    Targets are the pixels of hidden patches, each patch with mean 0 and variance 1, less where it is nearly empty.

    Raises:
        ValueError: the encoder is no plain vision transformer, or a view has a single patch.
    """

    def __init__(self, encoder: nn.Module, in_channels: int, options: MethodOptions) -> None:
        super().__init__()
        vit: Any = getattr(encoder, "model", None)
        # A stem of convolutions sees more than one patch, and would see hidden pixels.
        if not isinstance(vit, VisionTransformer) or type(vit.patch_embed) is not PatchEmbed:
            name = type(encoder if vit is None else vit).__name__
            raise ValueError(
                f"--method mae hides patches from a vision transformer, and can do this to plain ones alone, not to "
                f"{name}. Give --encoder tu-vit_tiny_patch16_224 or another ViT or DeiT of timm, or --method moco, "
                "which takes every encoder"
            )
        self.encoder, self.mask_share = encoder, options.mask_share
        self.visible = vit.patch_drop = VisiblePatches(vit.num_prefix_tokens)
        self.side = vit.patch_embed.patch_size[0]
        if options.side and options.side < 2 * self.side:
            raise ValueError(
                f"--image-size {options.side} leaves a single patch of {self.side} pixels, and nothing can be hidden "
                f"from it. Give --image-size {6 * self.side} or more"
            )
        self.embed = nn.Linear(vit.embed_dim, WIDTH)
        self.hidden_token = nn.Parameter(torch.randn(WIDTH) * 0.02)
        self.blocks = nn.Sequential(*(Block(WIDTH, HEADS, qkv_bias=True) for _ in range(BLOCKS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.pixels = nn.Linear(WIDTH, in_channels * self.side**2)

    def forward(self, view_a: Tensor, view_b: Tensor, places: Tensor) -> Step:
        """See Method.forward. Embeddings are the means of what the encoder makes of the visible patches."""
        images = torch.cat((view_a, view_b))
        order = patch_order(torch.cat(places.unbind(1)), images[0, 0].numel() // self.side**2)
        seen = self.count_visible(order.shape[1])
        guessed, tokens = self.guess(images, order)
        hidden = order[:, seen:, None]
        with torch.autocast(images.device.type, enabled=False):
            targets, _, _ = normalise_patches(cut_patches(in_full(images), self.side))
            targets = targets.gather(1, hidden.expand(-1, -1, targets.shape[2]))
            loss = functional.mse_loss(in_full(guessed).gather(1, hidden.expand_as(targets)), targets)
        explained = 1 - loss.detach() / targets.square().mean().clamp_min(1e-6)
        pooled = in_full(tokens[: len(view_a), self.visible.prefix :]).mean(1)
        return Step(loss, pooled.detach(), {"explained": explained})

    def count_visible(self, patches: int) -> int:
        """Patches of a view that the encoder sees."""
        return min(max(1, round(patches * (1 - self.mask_share))), patches - 1)

    def guess(self, images: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        """Let the encoder see the first patches of an order, and the decoder guess all of them.

        Args:
            images: (N, C, H, W). order: (N, L), see patch_order.

        Returns:
            Patches (N, L, C * side * side) as normalise_patches gives them, and the encoder's tokens, class tokens
            first.
        """
        vit: Any = self.encoder.model
        self.visible.kept = order[:, : self.count_visible(order.shape[1])]
        try:
            tokens = vit.forward_features(images)
        finally:
            self.visible.kept = None
        embedded = self.embed(tokens)
        prefix, seen = embedded[:, : self.visible.prefix], embedded[:, self.visible.prefix :]
        unseen = self.hidden_token.to(seen.dtype).expand(len(seen), order.shape[1] - seen.shape[1], -1)
        back = order.argsort(1)[..., None].expand(-1, -1, WIDTH)
        patches = torch.cat((seen, unseen), dim=1).gather(1, back)  # in the order of the image
        grid = [length // self.side for length in images.shape[-2:]]
        patches = patches + build_sincos2d_pos_embed(grid, dim=WIDTH, device=patches.device)
        decoded = self.blocks(torch.cat((prefix, patches), dim=1))
        return self.pixels(self.norm(decoded))[:, self.visible.prefix :], tokens

    @torch.no_grad()
    def complete(self, images: Tensor) -> dict[str, Tensor]:
        """What the encoder saw of images, the rest grey, and the images with what was guessed in the rest.

        Guesses have the true mean and deviation of their patches, which are no part of what is learned.
        """
        numbers = torch.arange(len(images), device=images.device, dtype=torch.float32)
        order = patch_order(numbers[:, None], images[0, 0].numel() // self.side**2)
        hidden = order[:, self.count_visible(order.shape[1]) :, None]
        guessed, _ = self.guess(images, order)
        patches = cut_patches(images, self.side)
        _, mean, deviation = normalise_patches(patches)
        hidden = hidden.expand(-1, -1, patches.shape[2])
        guessed = (in_full(guessed) * deviation + mean).gather(1, hidden)
        shape, side = images.shape, self.side
        grey = images.amin((2, 3)) + images.amax((2, 3))  # (N, C)
        greys = cut_patches((0.5 * grey)[..., None, None].expand(shape), side)
        return {
            "visible": join_patches(patches.scatter(1, hidden, greys.gather(1, hidden)), shape, side),
            "completed": join_patches(patches.scatter(1, hidden, guessed), shape, side),
        }


class VisiblePatches(nn.Module):
    """Stands where timm's vision transformers drop patches: tokens (N, prefix + L, D) -> those that are kept.

    kept: (N, n) numbers of patches in the order in which they are wanted; None keeps all.
    """

    def __init__(self, prefix: int) -> None:
        super().__init__()
        self.prefix = prefix
        self.kept: Tensor | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        """Class tokens stay."""
        if self.kept is None:
            return tokens
        wanted = self.kept[..., None].expand(-1, -1, tokens.shape[2])
        return torch.cat((tokens[:, : self.prefix], tokens[:, self.prefix :].gather(1, wanted)), dim=1)


def patch_order(keys: Tensor, patches: int) -> Tensor:
    """A random order of the patches of each view, as a function of the view alone.

    So a run that goes on, or is divided among processes, hides what it would have hidden.

    Args:
        keys: (N, ...) float32, the matrices of views, no two of which are alike. patches: L.

    Returns:
        (N, L), each row the numbers 0 to L - 1.
    """
    bits = keys.float().contiguous().flatten(1).view(torch.int32).long()
    mixed = torch.zeros_like(bits[:, 0])
    for column in bits.unbind(1):
        mixed = _mix(mixed ^ (column & WORD))
    numbers = _mix(torch.arange(1, patches + 1, device=keys.device))
    return _mix(mixed[:, None] ^ numbers).argsort(dim=1, stable=True)


def _mix(words: Tensor) -> Tensor:
    """Numbers of 32 bits, in each of which every bit depends on every bit of the one before."""
    for _ in range(2):
        words = ((words ^ (words >> 16)) * 0x45D9F3B) & WORD
    return words ^ (words >> 16)


def cut_patches(images: Tensor, side: int) -> Tensor:
    """Images (N, C, H, W) as patches (N, L, C * side * side), row by row."""
    return functional.pixel_unshuffle(images, side).flatten(2).mT


def join_patches(patches: Tensor, shape: Sequence[int], side: int) -> Tensor:
    """Images of a shape (N, C, H, W) from their patches."""
    return functional.pixel_shuffle(patches.mT.unflatten(2, (shape[2] // side, shape[3] // side)), side)


def normalise_patches(patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each patch with mean 0 and variance 1 over its pixels and channels; its mean and its deviation (N, L, 1).

    FLOOR is in the deviation, so patches that vary less than that come out near 0.
    """
    mean = patches.mean(2, keepdim=True)
    deviation = (patches.var(2, keepdim=True) + FLOOR).sqrt()
    return (patches - mean) / deviation, mean, deviation
