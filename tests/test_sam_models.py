"""Weights of SAM from files and folders: tiny networks with random values against the packages' own predictors."""

import json
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sam_standins import build_tiny_segment_anything, build_tiny_transformers

from annotation.sam import PUBLISHED, build_segment_anything, describe_encoder, load_sam
from annotation.sam_engine import Sam
from annotation.sam_masks import Frame, resize_logits
from annotation.sam_options import SamOptions

segment_anything = pytest.importorskip("segment_anything")
pytest.importorskip("transformers")

PLAIN = SamOptions(cache_gb=0, max_share=1)
BOXES = np.array([[10.0, 20, 60, 80], [200, 100, 300, 250], [400.5, 3.25, 480, 90]])


def picture(height=300, width=500):
    """Smooth colours, so that a swap of channels or axes shows."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (6, 9, 3), np.uint8)
    import cv2

    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A checkpoint and two folders of tiny random networks, by kind."""
    folder = tmp_path_factory.mktemp("weights")
    torch.save(build_tiny_segment_anything().state_dict(), folder / "tiny.pth")
    for kind in ("sam", "sam2"):
        build_tiny_transformers(kind).save_pretrained(folder / kind)
    return {"pth": folder / "tiny.pth", "sam": folder / "sam", "sam2": folder / "sam2"}


def ask(sam, boxes=None, points=None, several=False, image=None):
    """Logits over the whole picture (n, answers, H, W), and the predicted IoU."""
    image = picture() if image is None else image
    encoding = sam.encode(image)
    logits, ious = sam._decode(encoding, boxes, points, None, several=several)
    box = (0, 0, image.shape[1], image.shape[0])
    whole = [
        [np.concatenate([part for _, part in resize_logits(encoding.frame, one, box)]) for one in some]
        for some in logits
    ]
    return np.array(whole), ious


@pytest.mark.parametrize(("height", "width"), [(300, 500), (150, 64), (97, 128)])
def test_a_checkpoint_answers_as_segment_anything_does(weights, height, width):
    image, scale = picture(height, width), 128 / max(height, width)
    boxes = BOXES * np.tile([width / 500, height / 300], 2)
    reference = segment_anything.SamPredictor(build_tiny_segment_anything())
    reference.set_image(image)
    sam = load_sam(weights["pth"], options=PLAIN)
    features = sam.encode(image).features[0]
    np.testing.assert_allclose(features, reference.features, atol=2e-3)
    for given, points in ((boxes, None), (boxes, boxes.reshape(-1, 2, 2).mean(1)[:, None]), (None, boxes[:, None, :2])):
        frame = Frame((0, 0, width, height), 128, True)
        squares = None if given is None else torch.from_numpy(frame.to_square(given.reshape(-1, 2, 2)).reshape(-1, 4))
        places = None if points is None else torch.from_numpy(frame.to_square(points))
        if given is not None:  # half a pixel of the square and its rounding apart from the package's own scaling
            ours = torch.from_numpy(reference.transform.apply_boxes(given, (height, width))).float()
            assert (squares - ours + 0.5).abs().max() < 1e-4 and scale > 0
        labels = None if points is None else torch.ones(len(boxes), 1)
        expected, ious, _ = reference.predict_torch(places, labels, squares, None, given is None, return_logits=True)
        got, got_ious = ask(sam, given, points, given is None, image)
        assert got.shape == expected.shape
        np.testing.assert_allclose(got, expected, atol=0.02 * float(expected.std()))
        np.testing.assert_allclose(got_ious, ious, atol=5e-3)


def test_a_sam_folder_answers_as_transformers_does(weights):
    image, model = picture(), build_tiny_transformers("sam")
    frame = Frame((0, 0, 500, 300), 128, True)
    from segment_anything.utils.transforms import ResizeLongestSide

    resized = torch.from_numpy(ResizeLongestSide(128).apply_image(image)).permute(2, 0, 1).float()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375]))
    pixels = torch.nn.functional.pad((resized - mean) / std, (0, 0, 0, 128 - resized.shape[1]))[None]
    boxes = torch.from_numpy(frame.to_square(BOXES.reshape(-1, 2, 2)).reshape(1, -1, 4))
    with torch.no_grad():
        expected = model(pixel_values=pixels, input_boxes=boxes, multimask_output=False)
    sam = load_sam(weights["sam"], options=PLAIN)
    logits, ious = sam._decode(sam.encode(image), BOXES, None, None, several=False)
    np.testing.assert_allclose(logits, expected.pred_masks[0], atol=0.02 * float(expected.pred_masks.std()))
    np.testing.assert_allclose(ious, expected.iou_scores[0], atol=5e-3)


def test_a_sam2_folder_answers_as_transformers_does(weights):
    """Against the processor of transformers, from the picture to the logits in the picture."""
    import transformers

    image, model = picture(), build_tiny_transformers("sam2")
    processor = transformers.Sam2Processor(
        transformers.Sam2ImageProcessor(size={"height": 128, "width": 128}), target_size=128
    )
    # The processor does not take the half pixel off that the network adds.
    half = np.tile(np.array([500, 300]) / 128 / 2, 2)
    inputs = processor(images=image, input_boxes=[(BOXES - half).tolist()], return_tensors="pt")
    with torch.no_grad():
        expected = model(
            **{key: value for key, value in inputs.items() if key in ("pixel_values", "input_boxes")},
            multimask_output=False,
        )
    whole = processor.post_process_masks(expected.pred_masks, [(300, 500)], binarize=False)[0]
    got, ious = ask(load_sam(weights["sam2"], options=PLAIN), BOXES)
    np.testing.assert_allclose(got, whole, atol=0.05 * float(whole.std()))
    np.testing.assert_allclose(ious, expected.iou_scores[0], atol=5e-3)


@pytest.mark.parametrize("kind", ["pth", "sam", "sam2"])
def test_the_whole_path_with_random_weights(weights, kind, tmp_path):
    options = SamOptions(
        cache=tmp_path, points=True, chunk=2, max_share=1, points_per_side=3, min_iou=0, min_stability=0
    )
    sam = load_sam(weights[kind], options=options)
    for found in (
        sam.segment_boxes(picture(), BOXES),
        sam.segment_points(picture(), BOXES[:, :2]),
        sam.segment_everything(picture()),
    ):
        assert found.labels.shape == (300, 500) and found.labels.dtype == np.int32
        assert ((found.scores >= 0) & (found.scores <= 1)).all()
    again = load_sam(weights[kind], options=options)
    again.network.encode = None  # from the disk, or not at all
    np.testing.assert_array_equal(
        again.segment_boxes(picture(), BOXES).labels, sam.segment_boxes(picture(), BOXES).labels
    )
    chunks = Sam(
        sam.network, SamOptions(cache=tmp_path, points=True, chunk=50, max_share=1, min_iou=0, min_stability=0)
    )
    np.testing.assert_array_equal(
        chunks.segment_boxes(picture(), BOXES).labels, sam.segment_boxes(picture(), BOXES).labels
    )


def test_other_weights_have_another_digest(weights, tmp_path):
    torch.save(build_tiny_segment_anything(seed=1).state_dict(), tmp_path / "other.pth")
    shutil.copytree(weights["sam2"], tmp_path / "copy")
    digests = [load_sam(path).network.digest for path in (*weights.values(), tmp_path / "other.pth")]
    assert len(set(digests)) == 4
    assert load_sam(tmp_path / "copy").network.digest == digests[2]


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "prefix", "half"])
def test_checkpoints_in_other_wrappings(weights, tmp_path, wrapper):
    state = torch.load(weights["pth"], weights_only=True)
    payload = {wrapper: state, "epoch": 3}
    if wrapper == "prefix":
        payload = {f"module.{key}": value for key, value in state.items()} | {"other": torch.zeros(1)}
    if wrapper == "half":
        payload = {key: value.half() for key, value in state.items()}
    torch.save(payload, tmp_path / "wrapped.pth")
    got = ask(load_sam(tmp_path / "wrapped.pth", options=PLAIN), BOXES)[0]
    expected = ask(load_sam(weights["pth"], options=PLAIN), BOXES)[0]
    np.testing.assert_allclose(got, expected, atol=0.05 * expected.std())


def test_a_folder_of_the_video_model_is_taken(weights, tmp_path):
    folder = tmp_path / "video"
    shutil.copytree(weights["sam2"], folder)
    facts = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(facts | {"model_type": "sam2_video"}))
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2] * 3})
    )
    sam = load_sam(folder, options=SamOptions("sam2", cache_gb=0))
    assert not sam.network.keep_ratio and sam.network.side == 128
    assert list(sam.network.mean) == pytest.approx([127.5, 102, 76.5])
    assert ask(sam, BOXES)[0].shape == (3, 1, 300, 500)


@pytest.mark.parametrize("name", ["vit_b", "vit_l", "vit_h"])
def test_types_are_told_from_the_tensors(name):
    """By shapes alone, against the package's own builders; the built network has the same tensors."""
    with torch.device("meta"):
        official = segment_anything.sam_model_registry[name]()
    state = official.state_dict()
    shape = describe_encoder(state, Path("x.pth"))
    assert shape.name == name and shape.side == 1024
    built = build_segment_anything(shape)
    assert {key: value.shape for key, value in built.state_dict().items()} == {key: v.shape for key, v in state.items()}
    ours, theirs = built.image_encoder, official.image_encoder
    assert [block.window_size for block in ours.blocks] == [block.window_size for block in theirs.blocks]
    assert [block.attn.num_heads for block in ours.blocks] == [block.attn.num_heads for block in theirs.blocks]


# ---- what is refused ----


def test_the_wrong_type_is_refused(weights):
    with pytest.raises(ValueError, match=r"tiny.pth holds a ViT of width 32 and depth 2, expected vit_h as --sam-type"):
        load_sam(weights["pth"], options=SamOptions("vit_h"))
    with pytest.raises(ValueError, match="holds sam2, expected vit_b as --sam-type says"):
        load_sam(weights["sam2"], options=SamOptions("vit_b"))
    with pytest.raises(ValueError, match="holds a ViT of width 32 and depth 2, expected sam2"):
        load_sam(weights["sam"], options=SamOptions("sam2"))


@pytest.mark.parametrize("name", ["facebook/sam-vit-base", "missing.pth"])
def test_names_of_a_hub_are_not_downloaded(name):
    with pytest.raises(
        FileNotFoundError, match=f"{name} is neither a file nor a folder; expected .*Nothing is downloaded.*hf"
    ):
        load_sam(Path(name))


class Trap:
    def __reduce__(self):
        return open, (str(Path(__file__).with_name("trap")), "w")


def refuse(tmp_path, payload):
    path = tmp_path / "some.pth"
    torch.save(payload, path) if not isinstance(payload, bytes) else path.write_bytes(payload)
    with pytest.raises(ValueError, match="expected") as error:
        load_sam(path)
    assert str(path) in str(error.value)
    return str(error.value)


def test_other_files_are_refused_by_what_they_are(tmp_path, weights):
    state = torch.load(weights["pth"], weights_only=True)
    assert "cannot be read as a checkpoint" in refuse(tmp_path, b"no weights")
    assert "cannot be read as a checkpoint" in refuse(tmp_path, weights["pth"].read_bytes()[:5000])
    assert "cannot be read as a checkpoint" in refuse(tmp_path, pickle.dumps(Trap()))
    assert "cannot be read as a checkpoint" in refuse(tmp_path, {"model": Trap()})
    assert not Path(__file__).with_name("trap").exists()
    assert "holds a list" in refuse(tmp_path, [torch.zeros(2)])
    assert "holds no SAM: it has conv1.weight" in refuse(tmp_path, {"conv1.weight": torch.zeros(3)})
    assert "holds no SAM: it has nothing" in refuse(tmp_path, {})
    meta = refuse(tmp_path, {"model": {"image_encoder.trunk.pos_embed": torch.zeros(3)}})
    assert "SAM 2 in Meta's own form" in meta and PUBLISHED["sam2"] in meta
    assert "MobileSAM" in refuse(tmp_path, {"image_encoder.layers.0.weight": torch.zeros(3)})
    lacking = {key: value for key, value in state.items() if "iou_token" not in key}
    assert "mask_decoder.iou_token.weight" in refuse(tmp_path, lacking)
    lacking = {key: value for key, value in state.items() if "rel_pos_h" not in key}
    assert "blocks.0.attn.rel_pos_h" in refuse(tmp_path, lacking)
    other = state | {"prompt_encoder.no_mask_embed.weight": torch.zeros(1, 31)}
    assert "no_mask_embed" in refuse(tmp_path, other)


def test_other_folders_are_refused_by_what_they_are(tmp_path, weights):
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(ValueError, match="folder has no config.json; expected a folder of transformers"):
        load_sam(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not JSON"):
        load_sam(folder)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="folder holds a model of the type bert, expected sam or sam2"):
        load_sam(folder)
    shutil.copy(weights["sam2"] / "config.json", folder)
    with pytest.raises(ValueError, match="folder could not be loaded as Sam2Model"):
        load_sam(folder)
    (folder / "model.safetensors").write_bytes((weights["sam2"] / "model.safetensors").read_bytes()[:3000])
    with pytest.raises(ValueError, match="folder could not be loaded as Sam2Model"):
        load_sam(folder)
    from safetensors.torch import load_file, save_file

    state = load_file(weights["sam2"] / "model.safetensors")
    del state["mask_decoder.iou_token.weight"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="folder lacks 1 tensors of Sam2Model, first mask_decoder.iou_token.weight"):
        load_sam(folder)


@pytest.mark.parametrize(
    ("package", "kind", "command"),
    [
        ("segment_anything", "pth", "pip install segment-anything"),
        ("transformers", "sam2", "pip install 'transformers"),
    ],
)
def test_a_missing_package_is_named(weights, monkeypatch, package, kind, command):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=command):
        load_sam(weights[kind])


@pytest.mark.slow
def test_a_whole_vit_b(tmp_path):
    torch.manual_seed(0)
    official = segment_anything.sam_model_registry["vit_b"]()
    torch.save(official.state_dict(), tmp_path / "vit_b.pth")
    image = picture()
    reference = segment_anything.SamPredictor(official)
    reference.set_image(image)
    sam = load_sam(tmp_path / "vit_b.pth", options=SamOptions("vit_b", cache_gb=0))
    features = sam.encode(image).features[0]
    np.testing.assert_allclose(features, reference.features, atol=5e-3)
    squares = torch.from_numpy(Frame((0, 0, 500, 300), 1024, True).to_square(BOXES.reshape(-1, 2, 2)).reshape(-1, 4))
    expected, ious, _ = reference.predict_torch(None, None, squares, None, False, return_logits=True)
    got, got_ious = ask(sam, BOXES)
    np.testing.assert_allclose(got, expected, atol=0.02 * float(expected.std()))
    np.testing.assert_allclose(got_ious, ious, atol=5e-3)
