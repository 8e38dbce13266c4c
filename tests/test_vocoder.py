"A vocoder's training: exact resume, whole steps, any number of processes, what it leaves behind."

import json
import math
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import lines, weights

from cmmd import train as tr
from cmmd.checkpoint import CheckpointError, find_checkpoint, list_checkpoints
from cmmd.core import make_generator
from cmmd.mel import log_mel
from cmmd.melgan import MelGANDiscriminator, MelGANGenerator, load_vocoder, match_mel, mel_loss
from cmmd.soundbank import SoundBank, toy_sounds
from cmmd.train import TrainError, read_metrics, train_step
from cmmd.vocoder import (
    SoundData,
    SoundTrainer,
    VocoderConfig,
    VocoderTrainer,
    generator_losses,
    new_vocoder,
    stft_loss,
    train_vocoder,
)


def make_bank(n=7, bad=(), rate=16_000):
    "Short sounds of several lengths, some of them shorter than a crop."
    lengths = tuple(1500 + 700 * i for i in range(n))
    samples = 0.2 * torch.randn(sum(lengths), generator=make_generator(0, "test sounds"))
    bank = SoundBank(samples, lengths, tuple(f"sound{i}" for i in range(n)), rate)
    for i in bad:
        bank[i][:] = math.nan
    return bank


BANK = make_bank()


def networks(seed=0):
    torch.manual_seed(seed)
    generator = MelGANGenerator(ratios=(8, 8, 4), ngf=4, n_residual_layers=1).start_silent()
    return generator, MelGANDiscriminator(n_scales=2, ndf=4, n_layers=2, max_channels=16)


def config(**changes):
    return VocoderConfig.tiny(
        **{
            "steps": 5,
            "batch_size": 2,
            "sequence": 2048,
            "warmup_steps": 2,
            "adversarial_from": 2,
            "log_every": 2,
            "save_every": 100,
            **changes,
        }
    )


def run(c=None, bank=BANK, **kwargs):
    generator, discriminator = networks()
    result = train_vocoder(
        generator,
        bank,
        discriminator=discriminator,
        config=c or config(),
        device="cpu",
        **kwargs,
    )
    return result, discriminator


def make_trainer(c=None, bank=BANK):
    return VocoderTrainer(*networks(), bank, config=c or config(), device="cpu")


def everything(trainer):
    "Weights of both networks, the average, and both Adams' moments: copies."
    moments = [
        o.state[p][name]
        for o in trainer.optimizers.values()
        for group in o.param_groups
        for p in group["params"]
        if p in o.state
        for name in ("step", "exp_avg", "exp_avg_sq")
    ]
    tensors = (*trainer.params, *trainer.judge_params, *trainer.ema.shadow_params, *moments)
    return [x.detach().clone() for x in tensors]


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


def same(a, b):
    (one, judge_one), (two, judge_two) = a, b
    pairs = (one.model, one.ema_model, judge_one), (two.model, two.ema_model, judge_two)
    return torch.equal(*(weights(*models) for models in pairs)) and (
        lines(one.history) == lines(two.history)
    )


@pytest.fixture(scope="module")
def whole():
    return run()


# ---------------------------------------------------------------- exact resume
class Stop(Exception):
    "Ends a run where a kill would."


@pytest.mark.parametrize("stop", [1, 2, 3, 4])  # the discriminator joins at 2
def test_resume_is_exact(tmp_path, monkeypatch, whole, stop):
    gradients = VocoderTrainer.gradients

    def killed(trainer, batches):
        if trainer.step == stop:
            raise Stop
        return gradients(trainer, batches)

    c = config(save_every=stop)
    monkeypatch.setattr(VocoderTrainer, "gradients", killed)
    with pytest.raises(Stop):
        run(c, out_dir=tmp_path)
    monkeypatch.undo()
    assert find_checkpoint(tmp_path).step == stop
    assert same(run(c, out_dir=tmp_path, resume=True), whole)
    assert lines(read_metrics(tmp_path / "metrics.jsonl")) == lines(whole[0].history)


def test_both_adams_are_saved(tmp_path):
    c = config(save_every=3)
    run(c, out_dir=tmp_path)
    (tmp_path / "step_00000005").rename(tmp_path / "gone")
    names = {p.name for p in (tmp_path / "step_00000003").iterdir()}
    found = find_checkpoint(tmp_path)
    assert {"model", "ema", "discriminator", "optimizer", "discriminator_optimizer"} <= set(
        found.tensors
    ), names


def test_a_damaged_checkpoint_falls_back(tmp_path, capfd, whole):
    c = config(save_every=3)
    run(c, out_dir=tmp_path)
    path = tmp_path / "step_00000005" / "discriminator.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert same(run(c, out_dir=tmp_path, resume=True), whole)
    assert capfd.readouterr().err.count("step_00000005") == 1
    for path in list_checkpoints(tmp_path):
        (path / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="none of the"):
        run(c, out_dir=tmp_path, resume=True)


def test_other_runs_are_refused(tmp_path):
    run(out_dir=tmp_path)
    with pytest.raises(ValueError, match="earlier run"):
        run(out_dir=tmp_path)
    for change in ({"mel_weight": 3.0}, {"sequence": 2304}, {"adversarial_from": 3}):
        with pytest.raises(CheckpointError, match=next(iter(change))):
            run(config(**change), out_dir=tmp_path, resume=True)
    with pytest.raises(CheckpointError, match="fingerprint"):
        run(bank=make_bank(8), out_dir=tmp_path, resume=True)


# ---------------------------------------------------------------- crops
def crops(step=3, rank=0, world=1, **changes):
    c = config(batch_size=8, **changes)
    return SoundData(BANK, c, num_train_steps=1, rank=rank, world=world)[step]


def joined(batches):
    return torch.cat([b.waveform for b in batches]), sum((b.ids for b in batches), ())


def test_crops_do_not_depend_on_processes_or_pieces():
    wave, ids = joined(crops())
    parts = (
        [crops(rank=r, world=4)[0] for r in range(4)],
        crops(gradient_accumulation=4),
        [crops(rank=r, world=2, gradient_accumulation=2)[i] for i in (0, 1) for r in (0, 1)],
    )
    for some in parts:
        assert torch.equal(joined(some)[0], wave) and joined(some)[1] == ids
    assert not torch.equal(joined(crops(step=4))[0], wave)
    assert not torch.equal(joined(crops(seed=1))[0], wave)


def test_every_sound_once_per_epoch():
    data = SoundData(BANK, config(batch_size=1), num_train_steps=1)
    names = [data[step][0].ids[0] for step in range(14)]
    assert sorted(names[:7]) == sorted(names[7:]) == sorted(BANK.ids)


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_filters(probability):
    plain, _ = joined(crops(filter_probability=0.0))
    wave, _ = joined(crops(filter_probability=probability))
    changed = [not torch.equal(a, b) for a, b in zip(plain, wave)]
    assert changed == [bool(probability)] * 8 and wave.isfinite().all() and wave.abs().max() <= 1


def test_workers_change_nothing(whole):
    assert same(run(config(num_workers=2)), whole)


def test_batches_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="batch_size"):
        make_trainer(config(batch_size=3, gradient_accumulation=2))


# ---------------------------------------------------------------- a step counts whole or not at all
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_crop_changes_nothing(value):
    trainer = make_trainer(config(adversarial_from=0))
    assert train_step(trainer, trainer.data[0])
    before, batches = everything(trainer), trainer.data[1]
    batches[0].waveform[0, 7] = value
    assert not train_step(trainer, batches)
    assert equal(before, everything(trainer)) and (trainer.step, trainer.skipped) == (2, 1)
    assert train_step(trainer, trainer.data[2]) and not equal(before, everything(trainer))


def test_a_bad_discriminator_loss_changes_nothing(monkeypatch):
    import cmmd.vocoder as module

    trainer = make_trainer(config(adversarial_from=0))
    assert train_step(trainer, trainer.data[0])
    good, before = module.lsgan_discriminator_loss, everything(trainer)
    monkeypatch.setattr(module, "lsgan_discriminator_loss", lambda r, f: good(r, f) * math.nan)
    assert not train_step(trainer, trainer.data[1])
    assert equal(before, everything(trainer))


@pytest.mark.parametrize("network", ["params", "judge_params"])
def test_a_bad_gradient_changes_nothing(network):
    trainer = make_trainer(config(adversarial_from=0))
    assert train_step(trainer, trainer.data[0])
    before = everything(trainer)
    hook = getattr(trainer, network)[-1].register_hook(lambda grad: grad * math.nan)
    assert not train_step(trainer, trainer.data[1])
    assert equal(before, everything(trainer))
    hook.remove()
    assert train_step(trainer, trainer.data[2])


def test_a_loss_out_of_bounds_changes_nothing():
    trainer = make_trainer(config(adversarial_from=0, max_loss=1e-3))
    before = everything(trainer)
    assert not train_step(trainer, trainer.data[0]) and equal(before, everything(trainer))


def test_three_bad_steps_end_the_run_by_name(tmp_path):
    bank = make_bank(bad=range(7))
    with pytest.raises(TrainError, match=r"step 2 \(clips sound\d, sound\d\)"):
        run(config(filter_probability=0.0), bank=bank, out_dir=tmp_path)
    assert not list_checkpoints(tmp_path)
    result, judge = run(config(batch_size=1, steps=7), bank=make_bank(bad=[3]))
    assert result.skipped == 1 and weights(result.model, result.ema_model, judge).isfinite().all()


def test_accumulation_gives_the_same_gradients():
    one, two = (
        make_trainer(config(adversarial_from=0, batch_size=4, gradient_accumulation=n))
        for n in (1, 2)
    )
    a, b = (t.gradients(t.data[0]) for t in (one, two))
    assert a.keys() == b.keys() and all(math.isclose(a[k], b[k], rel_tol=1e-3) for k in a)
    for p, q in zip(one.params + one.judge_params, two.params + two.judge_params):
        assert torch.allclose(p.grad, q.grad, rtol=1e-2, atol=1e-3 * float(p.grad.abs().max()))


def test_the_discriminator_rests_until_it_joins():
    trainer = make_trainer()
    judge = [p.detach().clone() for p in trainer.judge_params]
    for step in range(2):
        train_step(trainer, trainer.data[step])
    assert all(torch.equal(a, b) for a, b in zip(judge, trainer.judge_params))
    assert not trainer.optimizers["discriminator_optimizer"].state
    train_step(trainer, trainer.data[2])
    assert not any(torch.equal(a, b) for a, b in zip(judge, trainer.judge_params))


# ---------------------------------------------------------------- losses
def test_total_is_the_weighted_sum():
    g = make_generator(0, "losses")
    wave, made = (0.3 * torch.randn(2, 4096, generator=g) for _ in range(2))
    judge, c = networks()[1], VocoderConfig.tiny()
    spec = networks()[0].spec
    losses = generator_losses(
        made, wave, matched=made, real=judge(wave), fake=judge(made), config=c, spec=spec
    )
    expected = (
        c.mel_weight * losses["mel"]
        + c.matched_weight * losses["matched"]
        + c.stft_weight * losses["stft"]
        + c.feature_weight * losses["feature"]
        + losses["adversarial"]
    )
    assert torch.isclose(losses["total"], expected, rtol=1e-6)
    assert losses["mel"] == losses["matched"] == mel_loss(made, wave, spec)


@settings(max_examples=10, deadline=None)
@given(gain=st.floats(0.01, 10.0), seed=st.integers(0, 99))
def test_stft_loss_of_a_gain(gain, seed):
    wave = 0.3 * torch.randn(1, 4096, generator=make_generator(seed, "gain"))
    expected = abs(1 - gain) + abs(math.log10(gain))
    found = float(stft_loss(gain * wave, wave, floor=0.0))
    assert math.isclose(found, expected, rel_tol=1e-3, abs_tol=1e-4)


# ---------------------------------------------------------------- what a run leaves
def test_tensorboard_and_model_folder(tmp_path):
    tensorboard = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="no TensorBoard"
    )
    result, _ = run(config(save_every=3), out_dir=tmp_path)
    events = tensorboard.EventAccumulator(str(tmp_path / "tensorboard"))
    tags = events.Reload().Tags()
    assert set(tags["audio"]) == {"true", "made"}
    assert set(tags["images"]) == {"true log-mel", "made log-mel"}
    assert {"loss", "loss_mel", "loss_adversarial", "loss_discriminator"} <= set(tags["scalars"])
    assert [e.step for e in events.Audio("made")] == [3, 5]
    assert events.Audio("true")[0].sample_rate == 16_000
    assert events.Images("made log-mel")[0].height == 80
    record = json.loads((tmp_path / "model" / "training.json").read_text())
    assert record["train"] == config(save_every=3).to_dict() and record["steps"] == 5
    vocoder = load_vocoder(tmp_path)
    mel = log_mel(BANK[6][None, :5632], vocoder.spec)
    with torch.no_grad():
        bare = result.ema_model(mel)
    expected = match_mel(bare, mel, vocoder.spec, rounds=vocoder.rounds)
    assert torch.allclose(vocoder(mel, vocoder.spec), expected, atol=1e-5)


def test_a_very_short_first_sound_can_be_shown(tmp_path):
    bank = SoundBank(torch.rand(3010), (10, 3000), ("blip", "sound"), 16_000)
    result, _ = run(config(save_every=1, steps=2), bank=bank, out_dir=tmp_path)
    assert result.step == 2


def test_new_networks_follow_from_the_seed():
    state = torch.get_rng_state()
    a, b, c = (new_vocoder(seed=s) for s in (3, 3, 4))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(weights(*a), weights(*b)) and not torch.equal(weights(*a), weights(*c))
    with torch.no_grad():  # silence in, silence out
        assert a[0](torch.full((1, 80, 20), -5.0)).abs().max() < 1e-3


# ---------------------------------------------------------------- errors
WRONG = {
    "sequence": st.integers(-10, 1 << 25).filter(lambda n: n % 256 or n < 2048 or n > 1 << 24),
    "beta1": st.floats().filter(lambda x: not 0 <= x <= 0.999),
    "beta2": st.floats().filter(lambda x: not 0 <= x <= 0.99999),
    "filter_probability": st.floats().filter(lambda x: not 0 <= x <= 1),
    "mel_weight": st.floats().filter(lambda x: not 0 <= x <= 1e6),
    "stft_weight": st.text(),
    "adversarial_from": st.one_of(st.integers(max_value=-1), st.booleans(), st.floats()),
    "steps": st.integers(max_value=0),
}


@settings(max_examples=80, deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(WRONG)))
def test_config_errors_name_the_field(data, name):
    with pytest.raises((TypeError, ValueError), match=name) as error:
        VocoderConfig.tiny(**{name: data.draw(WRONG[name])})
    assert "\n" not in str(error.value)


@settings(max_examples=30, deadline=None)
@given(sequence=st.integers(8, 1 << 16), probability=st.floats(0, 1), joins=st.integers(0, 10**9))
def test_good_configs_pass(sequence, probability, joins):
    c = VocoderConfig.tiny(
        sequence=256 * sequence, filter_probability=probability, adversarial_from=joins
    )
    assert json.loads(json.dumps(c.to_dict()))["sequence"] == 256 * sequence


def test_the_paper_config():
    c = VocoderConfig.paper()
    assert (c.sequence, c.feature_weight, c.mel_weight) == (65_536, 2.0, 10.0)
    assert c.stft_weight == c.matched_weight == c.adversarial_from == 0


def test_banks_and_sequences_that_do_not_fit():
    with pytest.raises(ValueError, match="bank must have the generator's rate 16000 Hz, got 8000"):
        make_trainer(bank=make_bank(rate=8000))
    torch.manual_seed(0)
    odd = MelGANGenerator(ratios=(8, 8, 8), ngf=4)
    with pytest.raises(ValueError, match="generator's hop 512, got 2304"):
        VocoderTrainer(odd, networks()[1], BANK, config=config(sequence=2304), device="cpu")


# ---------------------------------------------------------------- slow
@pytest.mark.slow
def test_two_processes_equal_two_pieces(tmp_path):
    c = config(steps=4, adversarial_from=1, batch_size=4)
    script = tmp_path / "two.py"
    script.write_text(
        "import sys, torch\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_vocoder import config, run\n"
        "torch.set_num_threads(1)\n"
        "run(config(steps=4, adversarial_from=1, batch_size=4), out_dir=sys.argv[1])\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    base = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, str(script), str(tmp_path / "run")]
    ranks = [base | {"RANK": r, "LOCAL_RANK": r, "ACCELERATE_USE_CPU": "true"} for r in "01"]
    with open(tmp_path / "stderr.txt", "w") as errors:
        processes = [subprocess.Popen(command, env=e, stderr=errors) for e in ranks]
        try:
            codes = [p.wait(timeout=600) for p in processes]
        finally:
            for p in processes:
                p.kill()
    assert codes == [0, 0], (tmp_path / "stderr.txt").read_text()[-2000:]
    found = find_checkpoint(tmp_path / "run")
    one, judge = run(replace(c, gradient_accumulation=2))
    record = json.loads((tmp_path / "run" / "model" / "training.json").read_text())
    assert record["machine"]["processes"] == 2
    for name, network in (("model", one.model), ("discriminator", judge)):
        for key, value in network.state_dict().items():
            assert torch.allclose(found.tensors[name][key], value, rtol=1e-3, atol=2e-5), key


# ---------------------------------------------------------------- magnitudes
def drawer(seed=0):
    torch.manual_seed(seed)
    return MelGANGenerator(ratios=(2,), ngf=4, stft_hop=128, n_residual_layers=1).start_silent()


def spectral(**changes):
    given = {"steps": 6, "batch_size": 2, "sequence": 4096, "log_every": 2, "save_every": 3}
    return VocoderConfig.spectral(**given | {"warmup_steps": 2} | changes)


def test_a_generator_of_magnitudes_trains_and_resumes_exactly(tmp_path, monkeypatch):
    whole = train_vocoder(drawer(), BANK, config=spectral(), device="cpu")
    gradients = SoundTrainer.gradients

    def killed(trainer, batches):
        if trainer.step == 4:
            raise Stop
        return gradients(trainer, batches)

    monkeypatch.setattr(SoundTrainer, "gradients", killed)
    with pytest.raises(Stop):
        train_vocoder(drawer(), BANK, config=spectral(), device="cpu", out_dir=tmp_path / "run")
    monkeypatch.setattr(SoundTrainer, "gradients", gradients)
    again = train_vocoder(
        drawer(), BANK, config=spectral(), device="cpu", out_dir=tmp_path / "run", resume=True
    )
    for a, b in ((whole.model, again.model), (whole.ema_model, again.ema_model)):
        assert torch.equal(weights(a), weights(b))
    assert set(whole.history[-1]) >= {"loss", "loss_mel", "grad_norm"}
    vocoder = load_vocoder(tmp_path / "run")
    assert vocoder.model.config.stft_hop == 128
    assert vocoder(torch.full((80, 3), -5.0), vocoder.spec).shape == (768,)


def test_pieces_of_a_batch_of_magnitudes_are_the_batch():
    one, two = (
        SoundTrainer(drawer(), BANK, config=spectral(gradient_accumulation=n), device="cpu")
        for n in (1, 2)
    )
    a, b = (t.gradients(t.data[0]) for t in (one, two))
    assert math.isclose(a["loss"], b["loss"], rel_tol=1e-4)
    for p, q in zip(one.params, two.params):
        assert torch.allclose(p.grad, q.grad, rtol=1e-2, atol=1e-4)


def test_a_nan_among_magnitudes_is_skipped():
    trainer = SoundTrainer(drawer(), BANK, config=spectral(), device="cpu")
    before, batches = weights(trainer.model).clone(), trainer.data[0]
    batches[0].waveform[0, 5] = math.nan
    assert not train_step(trainer, batches)
    assert torch.equal(weights(trainer.model), before)


def test_bf16_leaves_both_networks_plain():
    generator, discriminator = networks()
    c = config(steps=3, mixed_precision="bf16")
    before = [set(vars(network)) for network in (generator, discriminator)]
    for _ in range(2):
        train_vocoder(generator, BANK, discriminator=discriminator, config=c, device="cpu")
        assert [set(vars(network)) for network in (generator, discriminator)] == before
    trainer = VocoderTrainer(generator, discriminator, BANK, config=c, device="cpu")
    assert all("forward" in vars(network) for network in (generator, discriminator))
    tr.release_model(trainer)
    assert discriminator(torch.zeros(1, 4096))[0][0].dtype == torch.float32


def test_no_memory_for_the_judge_is_a_sentence(monkeypatch):
    generator, discriminator = networks()
    before, real = [set(vars(network)) for network in (generator, discriminator)], []
    prepare = tr.Accelerator.prepare

    def second_is_full(self, network):
        real.append(prepare(self, network))
        if len(real) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB.\nmore")
        return real[-1]

    monkeypatch.setattr(tr.Accelerator, "prepare", second_is_full)
    c = config(steps=3, mixed_precision="bf16")
    with pytest.raises(TrainError, match="out of memory before the first step") as error:
        train_vocoder(generator, BANK, discriminator=discriminator, config=c, device="cpu")
    assert "\n" not in str(error.value)
    assert [set(vars(network)) for network in (generator, discriminator)] == before


@pytest.mark.slow
def test_200_steps_of_the_tiny_config_halve_the_distance():
    bank, unseen = toy_sounds(512), toy_sounds(16, seed=1)
    generator, discriminator = new_vocoder("tiny", seed=0)
    true = torch.stack([unseen[i][:32_768] for i in range(16)])
    spec = generator.spec

    @torch.no_grad()
    def distances(model):
        mel = log_mel(true, spec)
        made = model(mel)
        matched = match_mel(made, mel, spec, rounds=2)
        return [float(mel_loss(x, true, spec)) for x in (made, matched)]

    before = distances(generator)
    c = VocoderConfig.tiny(steps=200, log_every=20)
    result = train_vocoder(generator, bank, discriminator=discriminator, config=c, device="cpu")
    after = distances(result.ema_model)
    print(f"bare, matched: {before} before, {after} after 200 steps")
    assert after[0] < 0.5 * before[0] and after[1] < 0.5 * before[1], (before, after)
