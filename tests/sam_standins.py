"""Small networks for tests of the SAM engine: stand-ins that paint what they are asked for, and tiny real ones."""

from functools import partial

import numpy as np
import torch
from torch import nn

from annotation.sam_masks import Frame

SIDE = 256


class BoxPainter:
    """Answers a box with the box itself, a point with a disc around it; remembers what it was given.

    Logits are distances to the border in pixels of the square, so that resizing keeps the border where it is.
    """

    name, digest = "stand-in", "0" * 64
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    device = torch.device("cpu")

    def __init__(self, keep_ratio=True, side=SIDE, radius=20):
        self.keep_ratio, self.side, self.radius = keep_ratio, side, radius
        self.squares, self.boxes, self.points, self.labels = [], [], [], []

    def encode(self, pixels):
        self.squares.append(pixels.numpy())
        return [pixels[:, :, ::4, ::4]]

    def decode(self, features, boxes, points, labels, several):
        cells = self.side // 4
        x = ((torch.arange(cells) + 0.5) * 4)[None, None, :]
        y = ((torch.arange(cells) + 0.5) * 4)[None, :, None]
        if points is not None:
            self.points.append(points.numpy())
            self.labels.append(labels.numpy())
            centre = points[:, 0].float() + 0.5  # as the networks do
            logits = self.radius - torch.hypot(x - centre[:, 0, None, None], y - centre[:, 1, None, None])
        if boxes is not None:
            self.boxes.append(boxes.numpy())
            left, top, right, bottom = (boxes[:, side, None, None] + 0.5 for side in range(4))
            logits = torch.minimum(torch.minimum(x - left, right - x), torch.minimum(y - top, bottom - y))
        answers = 3 if several else 1
        ious = torch.tensor([0.9, 0.6, 0.3])[:answers].expand(len(logits), answers)
        return torch.stack([logits, logits - 5, logits - 10][:answers], dim=1), ious


class DiscFinder(BoxPainter):
    """Answers a point with the disc that holds it, or with everything that is no disc.

    Args:
        discs: (row, column, radius) in the picture. frame: how the picture lies in the square, when it is whole.
    """

    def __init__(self, discs, frame: Frame, keep_ratio=True):
        super().__init__(keep_ratio)
        self.discs, self.frame = discs, frame

    def decode(self, features, boxes, points, labels, several):
        cells = np.indices((self.side // 4,) * 2)[::-1] * 4.0 + 2  # x and y of the cells' centres in the square
        scale = self.frame.used[0] / self.frame.size[0]
        fields = []
        for row, column, radius in self.discs:
            centre = np.array([column, row]) * scale
            fields.append(radius * scale - np.hypot(*(cells - centre[:, None, None])))
        fields.append(-np.max(fields, axis=0))
        logits, ious = [], []
        for x, y in points[:, 0].numpy() + 0.5:
            place = tuple(np.clip(np.array([y, x]) / 4, 0, self.side // 4 - 1).astype(int))
            owner = int(np.argmax([field[place] for field in fields]))
            found = fields[owner] * 10  # firm
            logits.append([found, fields[owner] * 0.05, found])
            ious.append([0.95 if owner < len(self.discs) else 0.99, 0.97, 0.5])
        return torch.tensor(np.array(logits), dtype=torch.float32), torch.tensor(ious)


def build_tiny_segment_anything(seed=0):
    """segment-anything with a two-block encoder for squares of 128, by the package's own classes; random values."""
    from segment_anything import modeling

    torch.manual_seed(seed)
    model = modeling.Sam(
        image_encoder=modeling.ImageEncoderViT(
            img_size=128,
            embed_dim=32,
            depth=2,
            num_heads=2,
            out_chans=32,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=3,
            global_attn_indexes=(1,),
        ),
        prompt_encoder=modeling.PromptEncoder(
            embed_dim=32, image_embedding_size=(8, 8), input_image_size=(128, 128), mask_in_chans=16
        ),
        mask_decoder=modeling.MaskDecoder(
            transformer_dim=32,
            transformer=modeling.TwoWayTransformer(depth=2, embedding_dim=32, num_heads=8, mlp_dim=2048),
        ),
    )
    for parameter in model.image_encoder.parameters():  # positions start at zero: they would hide mistakes
        nn.init.normal_(parameter, std=0.2) if not parameter.any() else None
    return model.eval()


def build_tiny_transformers(kind, seed=0, side=128):
    """SamModel or Sam2Model of transformers for squares of 128; random values."""
    import transformers as hub

    torch.manual_seed(seed)
    decoder = {"hidden_size": 32, "mlp_dim": 64, "iou_head_hidden_dim": 32}
    if kind == "sam":
        vision = hub.SamVisionConfig(
            hidden_size=32,
            output_channels=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=side,
            window_size=3,
            global_attn_indexes=[1],
            mlp_dim=64,
            num_pos_feats=16,
        )
        prompts = hub.SamPromptEncoderConfig(hidden_size=32, image_size=side)
        config = hub.SamConfig(
            vision_config=vision,
            prompt_encoder_config=prompts,
            mask_decoder_config=hub.SamMaskDecoderConfig(**decoder),
        )
        return hub.SamModel(config).eval()
    backbone = hub.Sam2HieraDetConfig(
        hidden_size=8,
        image_size=[side, side],
        embed_dim_per_stage=[8, 16, 32, 64],
        num_attention_heads_per_stage=[1, 1, 1, 1],
        blocks_per_stage=[1, 1, 2, 1],
        global_attention_blocks=[3],
        window_size_per_stage=[8, 4, 4, 2],
    )
    vision = hub.Sam2VisionConfig(
        backbone_config=backbone,
        backbone_channel_list=[64, 32, 16, 8],
        backbone_feature_sizes=[[side // part] * 2 for part in (4, 8, 16)],
        fpn_hidden_size=32,
    )
    config = hub.Sam2Config(
        vision_config=vision,
        prompt_encoder_config=hub.Sam2PromptEncoderConfig(hidden_size=32, image_size=side),
        mask_decoder_config=hub.Sam2MaskDecoderConfig(**decoder),
    )
    return hub.Sam2Model(config).eval()
