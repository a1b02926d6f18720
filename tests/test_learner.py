"""What a step leaves alone and what it keeps: frozen encoders, averaged weights, shares of the rate, memory."""

import json
import warnings

import pytest
import torch
from discs import write_dataset
from test_resume import assert_same_run, words_for
from test_trainer import make_learner, make_network, random_batch

import train
from checkpoint import load_checkpoint
from learner import resume
from losses import build_loss
from model import build_model
from networks.plain_unet import PlainUnet
from trainer import train_one_epoch
from weights import init_decoder

LOSS = build_loss("bce", num_logits=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "discs", train=4, val=2)


def copied(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def moved(module, before):
    return {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}


# ---- freezing ----


def test_a_frozen_encoder_stays_as_it_is_and_learns_afterwards():
    network = make_network()
    weight = network.encoder.stages[0][0].weight
    learner, options = make_learner(network, lr=0.01, freeze_encoder=2, weight_decay=0.5, clip=1.0)
    encoder, decoder = copied(network.encoder), copied(network.decoder)
    for epoch in range(2):
        learner.progress.epoch = epoch
        train_one_epoch(learner, [random_batch(0), random_batch(1)], LOSS, options, 1)
        assert not moved(network.encoder, encoder), "neither weights nor statistics, in spite of decay"
        assert weight.grad is None and not weight.requires_grad
        network.eval()  # as scoring between the epochs leaves it
    assert "blocks.0.0.weight" in moved(network.decoder, decoder)
    learner.progress.epoch = 2
    train_one_epoch(learner, [random_batch(0)], LOSS, options, 1)
    assert {name for name in encoder if not name.endswith("num_batches_tracked")} <= moved(network.encoder, encoder)
    assert all(layer.training for layer in network.modules())


def test_while_it_is_frozen_the_encoder_predicts_as_it_does_in_scoring():
    network = make_network()
    learner, options = make_learner(network, lr=1e-12, freeze_encoder=1)
    seen = []
    network.encoder.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output[-1].detach())))
    train_one_epoch(learner, [random_batch(0)], LOSS, options, 1)
    assert not network.encoder.training and network.decoder.training
    with torch.no_grad():
        torch.testing.assert_close(network.eval().encoder(seen[0][0])[-1], seen[0][1])


def test_weights_that_never_learn_stay_so_when_the_encoder_is_let_go():
    network = make_network()
    fixed = network.encoder.stages[1][0].weight.requires_grad_(False)
    learner, _ = make_learner(network, freeze_encoder=1)
    for frozen in (True, False):
        learner.start_training(freeze_encoder=frozen)
        assert not fixed.requires_grad
        assert network.encoder.stages[0][0].weight.requires_grad is not frozen


# ---- averaged weights ----


def test_the_average_follows_every_step():
    network = make_network()
    learner, options = make_learner(network, lr=0.05, optimiser="SGD", ema=0.5, accumulate=2)
    slow = {name: value.detach().double().clone() for name, value in network.named_parameters()}
    steps = []

    def follow(*_):
        steps.append(1)
        kept = min(0.5, (1 + len(steps)) / (10 + len(steps)))
        for name, value in network.named_parameters():
            slow[name] = kept * slow[name] + (1 - kept) * value.detach().double()

    learner.optimiser.optimizer.register_step_post_hook(follow)
    for epoch in range(2):
        learner.progress.epoch = epoch
        train_one_epoch(learner, [random_batch(seed) for seed in range(5)], LOSS, options, 1)
    assert len(steps) == learner.progress.step == learner.ema.updates == 6
    with learner.averaged():
        for name, value in network.named_parameters():
            torch.testing.assert_close(value.double(), slow[name], atol=1e-6, rtol=1e-5)
    assert any((value.double() - slow[name]).abs().max() > 1e-4 for name, value in network.named_parameters())


def test_the_best_checkpoint_holds_the_average_and_the_last_one_both(data, tmp_path):
    train.main(words_for(data, tmp_path, "run", "--ema", 0.9, "-lr", 0.01, epochs=1))
    best = load_checkpoint(tmp_path / "run" / "run.pth")[1]["model_state_dict"]
    last = load_checkpoint(tmp_path / "run" / "last_checkpoint")[1]
    average = last["ema_state_dict"]["weights"]
    assert average.keys() < best.keys() == last["model_state_dict"].keys()
    for name, value in best.items():
        expected = average[name] if name in average else last["model_state_dict"][name]
        assert torch.equal(value, expected), name
    assert any(not torch.equal(value, last["model_state_dict"][name]) for name, value in average.items())


def test_an_average_may_begin_and_end_on_resume(data, tmp_path, capsys):
    train.main(words_for(data, tmp_path, "run", epochs=1))
    first = load_checkpoint(tmp_path / "run" / "last_checkpoint")[1]
    assert first["ema_state_dict"] == {}
    train.main(words_for(data, tmp_path, "run", "--ema", 0.9, epochs=2))
    assert "warning: ema was None when this run began, it goes on with 0.9" in capsys.readouterr().out
    second = load_checkpoint(tmp_path / "run" / "last_checkpoint")[1]
    assert second["ema_state_dict"]["updates"] == 2
    train.main(words_for(data, tmp_path, "run", epochs=3))
    assert load_checkpoint(tmp_path / "run" / "last_checkpoint")[1]["ema_state_dict"] == {}


# ---- shares of the rate ----


def test_a_share_for_the_encoder_cannot_come_later(data, tmp_path, capsys):
    train.main(words_for(data, tmp_path, "run", epochs=1))
    for name, first, second, word in (("run", [], [0.1], "without"), ("other", [0.1], [], "with")):
        if name == "other":
            train.main(words_for(data, tmp_path, name, "--encoder-lr-scale", *first, epochs=1))
        more = ["--encoder-lr-scale", *second] if second else []
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            train.main(words_for(data, tmp_path, name, *more, epochs=2))
        error = capsys.readouterr().err
        assert ended.value.code == 1 and f"was trained {word} --encoder-lr-scale" in error, error
        assert str(tmp_path / name) in error and "another --exp-name" in error


def test_another_share_counts_from_then_on(data, tmp_path):
    train.main(words_for(data, tmp_path, "run", "--encoder-lr-scale", 0.1, epochs=1))
    before = load_checkpoint(tmp_path / "run" / "last_checkpoint")[1]["model_state_dict"]
    train.main(words_for(data, tmp_path, "run", "--encoder-lr-scale", 1e-9, epochs=2))
    after = load_checkpoint(tmp_path / "run" / "last_checkpoint")[1]["model_state_dict"]
    name = "encoder.stages.0.0.weight"
    torch.testing.assert_close(after[name], before[name], atol=1e-7, rtol=0)
    assert (after["decoder.blocks.0.0.weight"] - before["decoder.blocks.0.0.weight"]).abs().max() > 1e-5


def test_a_state_of_another_device_gets_the_options_of_this_one(tmp_path):
    """On a GPU the optimiser works on all weights at once, and its state must lie there; the flag is not restored."""
    learner, _ = make_learner(make_network())
    state = learner.optimiser.state_dict()
    for group in state["param_groups"]:
        group["fused"] = True
    learner.optimiser.load_state_dict(learner._with_present_options(state))
    assert all(group["fused"] is None for group in learner.optimiser.param_groups)
    assert resume(learner, tmp_path / "absent", None) is None


# ---- the start ----


@pytest.mark.parametrize(("how", "spread"), [("kaiming", lambda i, o: 2 / i), ("xavier", lambda i, o: 2 / (i + o))])
@pytest.mark.parametrize("names", [("plain-unet", "plain-16"), ("fpn", "resnet18")])
def test_decoders_start_as_the_papers_say(how, spread, names):
    torch.manual_seed(0)
    model = build_model(*names, in_channels=3, num_logits=1)
    before, decoder = copied(model), copied(model.decoder)
    init_decoder(model, how)
    convs = {name for name, layer in model.decoder.named_modules() if isinstance(layer, torch.nn.Conv2d)}
    assert {f"{name}.weight" for name in convs} <= moved(model.decoder, decoder)
    assert all(name.startswith("decoder.") for name in moved(model, before)), "neither encoder nor head"
    for name in convs:
        weight = model.decoder.get_submodule(name).weight.detach()
        outgoing, incoming = weight.shape[0] * weight[0, 0].numel(), weight[0].numel()
        if weight.numel() > 2000:
            assert float(weight.var(unbiased=False)) == pytest.approx(spread(incoming, outgoing), rel=0.15), name
            assert abs(float(weight.mean())) < 0.1 * float(weight.std())


def test_weights_that_are_loaded_win_over_the_start(data, tmp_path):
    train.main(words_for(data, tmp_path, "first", epochs=1))
    more = ["--init-from", tmp_path / "first" / "first.pth", "--init", "xavier", "-lr", 1e-12]
    train.main(words_for(data, tmp_path, "second", *more, epochs=1))
    first = load_checkpoint(tmp_path / "first" / "first.pth")[1]["model_state_dict"]
    second = load_checkpoint(tmp_path / "second" / "last_checkpoint")[1]["model_state_dict"]
    name = "decoder.blocks.0.0.weight"
    torch.testing.assert_close(second[name], first[name], atol=1e-7, rtol=1e-4)


# ---- memory ----


@pytest.fixture
def small_memory(monkeypatch):
    """A device that has memory for batches of three."""
    forward = PlainUnet.forward

    def limited(self, image):
        if self.training and len(image) > 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return forward(self, image)

    monkeypatch.setattr(PlainUnet, "forward", limited)


def wide(data, logs, name, *more, **how):
    words = words_for(data, logs, name, *more, **how)
    place = words.index("-b")
    return [*words[:place], *words[place + 2 :]]


def test_the_batch_is_halved_once_where_memory_ends(tmp_path, small_memory, capsys):
    data = write_dataset(tmp_path / "discs", train=7, val=1)
    train.main(wide(data, tmp_path, "auto", "-b", "auto", epochs=2))
    assert "the device has no memory for a batch of 6: going on with 3" in capsys.readouterr().out
    assert json.loads((tmp_path / "auto" / "args.json").read_text())["flags"]["batch"] == 3
    train.main(wide(data, tmp_path, "three", "-b", 3, epochs=2))
    assert_same_run(tmp_path / "auto", tmp_path / "three")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train.main(wide(data, tmp_path, "auto", "-b", "auto", epochs=3))
    said = capsys.readouterr().out
    assert "going on with" not in said and "warning: batch" not in said, "a resumed run knows its batch"


@pytest.mark.parametrize("batch", ["6", "auto"])
def test_memory_that_ends_again_is_an_error(tmp_path, monkeypatch, capsys, batch):
    def exhausted(self, image):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    data = write_dataset(tmp_path / "discs", train=7, val=1)
    train.main(wide(data, tmp_path, "run", "-b", 1, epochs=1))
    (tmp_path / "run" / "last_checkpoint").unlink()
    monkeypatch.setattr(train, "check_run_folder", lambda _: None)
    monkeypatch.setattr(torch.nn.Conv2d, "forward", exhausted)
    monkeypatch.setattr("model.stride_and_min_side", lambda *_: (16, 16))
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        train.main(wide(data, tmp_path, "run", "-b", batch, epochs=2))
    said = capsys.readouterr()
    assert ended.value.code == 1
    left = 3 if batch == "auto" else 6
    assert f"batch of {left} images of 32x32: lower -b" in said.err
    assert said.out.count("going on with") == (batch == "auto")
