"The contrastive loss inside a run: off is plain, resumed and divided it is the same, and it stops."

import math
from dataclasses import replace

import pytest
import torch
from runs import same, weights

from cmmd.checkpoint import CheckpointError, find_checkpoint
from cmmd.contrastive import TARGETS, ContrastiveConfig, ContrastiveLossFn, contrastive_loss
from cmmd.contrastive import NegativePairs, draw_negatives
from cmmd.core import make_generator
from cmmd.datasets import toy_dataset
from cmmd.joint import joint_loss
from cmmd.latents import load_vae
from cmmd.train import StepData, TrainConfig, TrainError, joint_loss_fn, train
from cmmd.unet import CMMDUNet, UNetConfig

# the smallest network: its last layers start at zero, so it answers zero until it has learnt
CONFIG = UNetConfig.tiny(
    video_channels=(16,), audio_channels=(80,), attention_levels=(0,), n_blocks=1, head_dim=16
)
SPEC = CONFIG.clip
MEL = (CONFIG.mel_mean, CONFIG.mel_std)


@pytest.fixture(scope="module")
def data():
    return toy_dataset(5, load_vae("tiny"), spec=SPEC, seed=1, mel=MEL, margin=4)


def make_model():
    torch.manual_seed(0)
    model = CMMDUNet(CONFIG)
    for p in model.parameters():  # no layer at zero: every stream hears the other from the start
        torch.nn.init.normal_(p, std=0.03) if not p.any() else None
    return model


def run(data, loss_fn=None, **changes):
    keep = {k: changes.pop(k) for k in ("out_dir", "resume", "model") if k in changes}
    c = TrainConfig.tiny(**{"steps": 3, "batch_size": 2, "log_every": 1, "save_every": 1} | changes)
    loss_fn = loss_fn or ContrastiveLossFn()
    model = keep.pop("model", None) or make_model()
    return train(model, data, config=c, loss_fn=loss_fn, device="cpu", **keep)


@pytest.fixture(scope="module")
def whole(data):
    return run(data)


def batch_of(data, step=0, **changes):
    config = TrainConfig.tiny(**{"steps": 3, "batch_size": 2} | changes)
    return StepData(data, config, num_train_steps=1000)[step]


# ---------------------------------------------------------------- runs
def test_a_run_reports_the_negatives(whole):
    assert [m["step"] for m in whole.history] == [1, 2, 3]
    for m in whole.history:
        assert m["loss_negative"] > 0
        total = m["loss_video"] + m["loss_audio"] - 2 * 0.01 * m["loss_negative"]
        assert m["loss"] == pytest.approx(total, abs=1e-5)


class Stop(Exception):
    "Ends a run where a kill would."


class Stopping(ContrastiveLossFn):
    def __call__(self, model, batch):
        if batch.step == 2:
            raise Stop
        return super().__call__(model, batch)


def test_resume_is_exact(data, whole, tmp_path):
    with pytest.raises(Stop):
        run(data, Stopping(), out_dir=tmp_path)
    assert find_checkpoint(tmp_path).step == 2
    assert same(run(data, out_dir=tmp_path, resume=True), whole)


def test_a_run_is_resumed_only_with_its_own_term(data, tmp_path):
    run(data, steps=1, out_dir=tmp_path, schedule="constant")
    other = ContrastiveLossFn(ContrastiveConfig(weight=0.02))
    with pytest.raises(CheckpointError, match="weight=0.01.*weight=0.02"):
        run(data, other, steps=2, out_dir=tmp_path, schedule="constant", resume=True)


def test_pieces_add_up_to_the_batch(data, whole):
    parts = run(data, gradient_accumulation=2)
    for a, b in zip(parts.history, whole.history):
        for name in ("loss", "loss_video", "loss_audio", "loss_negative", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=2e-3, abs=2e-5), name
    assert (weights(parts.model) - weights(whole.model)).abs().max() < 2e-3


def test_a_piece_draws_what_the_batch_draws(data):
    (together,) = batch_of(data)
    pieces = batch_of(data, gradient_accumulation=2)

    def drawn(batch):
        generators = [batch.generator(i, "negative") for i in range(len(batch.index))]
        return draw_negatives(data, batch.index, generators=generators, spec=SPEC)

    all_of_it = drawn(together)
    for place, piece in enumerate(map(drawn, pieces)):
        for name in ("video", "audio", "video_noise", "audio_noise"):
            assert torch.equal(getattr(piece, name), getattr(all_of_it, name)[place::2]), name


def test_workers_change_nothing(data, whole):
    assert same(run(data, num_workers=1), whole)


def test_weight_zero_is_the_joint_loss(data):
    off = ContrastiveLossFn(ContrastiveConfig(weight=0.0))
    plain, silent = run(data, joint_loss_fn), run(data, off)
    assert same(plain, silent) and "loss_negative" not in silent.history[0]


class Rising(ContrastiveLossFn):
    "Negatives that are out of bounds from step 1 on."

    def __call__(self, model, batch):
        loss = super().__call__(model, batch)
        return replace(loss, negative=loss.negative + 20 * (batch.step >= 1))


def test_a_run_out_of_bounds_stops_with_its_last_good_weights(data, tmp_path):
    good = run(data, steps=1, schedule="constant")
    model = make_model()
    with pytest.raises(TrainError) as stopped:
        run(
            data,
            Rising(),
            steps=9,
            schedule="constant",
            save_every=100,
            out_dir=tmp_path,
            model=model,
        )
    line = str(stopped.value)
    assert "loss_negative" in line and "max_loss 10" in line and "bound" in line
    assert "\n" not in line and "last good step" in line
    assert torch.equal(weights(model), weights(good.model))
    saved = find_checkpoint(tmp_path)
    kept = saved.tensors["model"]
    assert all(torch.equal(kept[k], v) for k, v in good.model.state_dict().items())


def test_a_huge_weight_diverges_and_is_stopped(data, tmp_path):
    huge = ContrastiveLossFn(ContrastiveConfig(weight=100.0))
    with pytest.raises(TrainError, match="max_loss"):
        run(
            data,
            huge,
            steps=60,
            learning_rate=0.02,
            schedule="constant",
            out_dir=tmp_path,
            save_every=100,
            log_every=10,
        )
    kept = find_checkpoint(tmp_path)
    assert all(x.isfinite().all() for x in kept.tensors["model"].values())


# ---------------------------------------------------------------- the loss
def given(data, *, n=600, **switches):
    clips, config = [0, 3], ContrastiveConfig(**switches)
    video, audio = data.batch(clips)
    g = make_generator(5)
    noise = [torch.randn(x.shape, generator=g) for x in (video, audio)]
    generators = [make_generator(6, i) for i in clips]
    negatives = draw_negatives(data, clips, generators=generators, spec=SPEC, config=config)
    positive = {"audio": audio, "t": torch.tensor([n, n - 200])}
    positive |= {"video_noise": noise[0], "audio_noise": noise[1]}
    return video, positive, negatives, config


@pytest.mark.parametrize("kind", ("shift", "split_swap", "swap", "mixture"))
def test_one_batch_equals_three_calls(data, kind):
    model = make_model()
    video, positive, neg, config = given(data, negatives=kind)
    with torch.no_grad():
        one = contrastive_loss(model, video, **positive, negatives=neg, config=config)
        total = joint_loss(model, video, **positive).total
        for rows in (slice(0, 2), slice(2, 4)):
            noise = {"video_noise": neg.video_noise[rows], "audio_noise": neg.audio_noise[rows]}
            wrong = {"audio": neg.audio[rows], "t": positive["t"], **noise}
            total = total - 0.01 * joint_loss(model, neg.video[rows], **wrong).total
    torch.testing.assert_close(one.total, total, atol=1e-5, rtol=0)
    assert (
        neg.clip.tolist() == [0, 1, 0, 1] and neg.audio_negated.tolist() == [True] * 2 + [False] * 2
    )


def test_targets_differ_only_in_the_exchanged_stream(data):
    model, errors = make_model(), {}
    for target in TARGETS:
        video, positive, neg, config = given(data, target=target)
        with torch.no_grad():
            loss = contrastive_loss(model, video, **positive, negatives=neg, config=config)
        errors[target] = loss.negative
    assert (errors["other"] < errors["own"]).all()
    assert not torch.allclose(errors["own"], errors["positive"])
    same_pair = replace(neg, video=video[neg.clip], audio=positive["audio"][neg.clip])
    with torch.no_grad():  # nothing exchanged: "own" and "positive" are one
        own, true = (
            contrastive_loss(
                model, video, **positive, negatives=same_pair, config=ContrastiveConfig(target=x)
            ).negative
            for x in ("own", "positive")
        )
    assert torch.equal(own, true)


def test_a_bound_stops_the_pull_of_the_negatives(data):
    model = make_model()
    video, positive, neg, _ = given(data)
    low = ContrastiveConfig(bound=1e-3, weight=0.5)
    loss = contrastive_loss(model, video, **positive, negatives=neg, config=low)
    assert torch.equal(loss.negative, torch.full((4,), 2e-3))
    grads = torch.autograd.grad(loss.total, model.parameters())
    plain = torch.autograd.grad(joint_loss(model, video, **positive).total, model.parameters())
    for a, b in zip(grads, plain):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


def test_inputs_are_left_alone(data):
    video, positive, neg, config = given(data, target="positive", bound=0.5)
    before = [x.clone() for x in (data.video, data.audio, video, neg.video, neg.audio)]
    contrastive_loss(make_model(), video, **positive, negatives=neg, config=config)
    after = (data.video, data.audio, video, neg.video, neg.audio)
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    assert isinstance(neg.to("cpu"), NegativePairs) and neg.to("cpu").about == neg.about


# ---------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    "wrong",
    [
        {"weight": -1e-9},
        {"weight": math.nan},
        {"weight": math.inf},
        {"target": "both"},
        {"target": None},
        {"negatives": "reverse"},
        {"bound": 0.0},
        {"bound": math.nan},
        {"n_negatives": 0},
        {"n_negatives": 1.5},
        {"weight": "0.01"},
    ],
    ids=str,
)
def test_a_wrong_switch_is_refused_by_name(wrong):
    with pytest.raises((ValueError, TypeError), match=next(iter(wrong))) as refused:
        ContrastiveConfig(**wrong)
    assert "\n" not in str(refused.value)


def test_what_the_data_cannot_give_is_refused(data):
    one = toy_dataset(1, load_vae("tiny"), spec=SPEC, seed=1, mel=MEL)
    for given_data, switches, words in (
        (one, {"negatives": "swap"}, "another clip"),
        (one, {"negatives": "mixture"}, "another clip"),
        (data, {"shift_frames": (2, 18)}, "shift_frames must lie within 1 to 17"),
        (data, {"shift_frames": (0, 4)}, "shift_frames"),
    ):
        config = ContrastiveConfig(**switches)
        with pytest.raises(ValueError, match=words):
            draw_negatives(
                given_data, [0], generators=[make_generator(0)], spec=SPEC, config=config
            )
    for index, n in (([0, 1], 1), ([], 0)):
        with pytest.raises(ValueError, match="generators"):
            generators = [make_generator(i) for i in range(n)]
            draw_negatives(data, index, generators=generators, spec=SPEC)
