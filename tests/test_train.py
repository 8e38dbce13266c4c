"Faults that a training run must survive: stops, kills, NaN, full memory, other configurations."

import json
import math
import os
import random
import signal
import time
from dataclasses import asdict, dataclass, replace

import pytest
import torch
from runs import lines, same, weights
from torch import nn

from cmmd import train as tr
from cmmd.checkpoint import CheckpointError, find_checkpoint, list_checkpoints
from cmmd.core import make_generator
from cmmd.datasets import ClipDataset
from cmmd.train import TrainConfig, TrainError, joint_loss_fn, train


@dataclass(frozen=True)
class Settings:
    num_train_steps: int = 1000
    audio_snr_scale: float = 1 / 40


class Pair(nn.Module):
    "The smallest model of two streams that look at each other."

    def __init__(self, delay=0.0):
        super().__init__()
        self.config, self.delay = Settings(), delay
        self.video, self.audio, self.cross = nn.Linear(4, 4), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, video, audio, t):
        if self.delay:
            time.sleep(self.delay)
        here = self.video(video.movedim(2, -1)) + self.cross(audio.mean(-1))[:, None, None, None]
        there = self.audio(audio.transpose(1, 2)).transpose(1, 2)
        return here.movedim(-1, 2), there * (t / 1000)[:, None, None]


def make_model(delay=0.0):
    torch.manual_seed(0)
    return Pair(delay)


def make_data(n=11, seed=0):
    g = make_generator(seed, "test data")
    return ClipDataset(
        torch.randn(n, 6, 4, 2, 2, generator=g),
        torch.randn(n, 8, 10, generator=g),
        tuple(f"clip{i}" for i in range(n)),
        0.0,
        1.0,
    )


DATA = make_data()


def config(**changes):
    return TrainConfig.tiny(
        **{
            "steps": 12,
            "batch_size": 4,
            "warmup_steps": 2,
            "log_every": 5,
            "save_every": 100,
            **changes,
        }
    )


def run(c=None, **kwargs):
    return train(
        kwargs.pop("model", None) or make_model(),
        kwargs.pop("data", DATA),
        config=c or config(),
        device="cpu",
        **kwargs,
    )


class Stop(Exception):
    "Ends a run where a kill would."


def stopping_at(step):
    def loss(model, batch):
        if batch.step == step:
            raise Stop
        return joint_loss_fn(model, batch)

    loss.__name__ = "joint_loss_fn"
    return loss


# ---------------------------------------------------------------- exact resume
@pytest.mark.parametrize("stop,workers", [*((s, 0) for s in range(1, 9)), (3, 2)])  # three epochs
def test_resume_is_exact(tmp_path, stop, workers):
    c = config(steps=9, num_workers=workers, save_every=stop)
    whole = run(replace(c, num_workers=0))
    with pytest.raises(Stop):
        run(c, out_dir=tmp_path, loss_fn=stopping_at(stop))
    assert find_checkpoint(tmp_path).step == stop
    resumed = run(c, out_dir=tmp_path, resume=True)
    assert same(resumed, whole)
    assert lines(tr.read_metrics(tmp_path / "metrics.jsonl")) == lines(whole.history)


def test_resume_from_a_path(tmp_path):
    c = config(save_every=4)
    whole = run(c, out_dir=tmp_path / "a")
    path = tmp_path / "a" / "step_00000004"
    assert same(run(c, out_dir=tmp_path / "b", resume=path), replace_history(whole, path))
    (path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError):
        run(c, out_dir=tmp_path / "c", resume=path)
    with pytest.raises(CheckpointError):
        run(c, out_dir=tmp_path / "c", resume=tmp_path / "absent")
    with pytest.raises(ValueError, match="out_dir"):
        run(c, resume=True)


def replace_history(result, path):  # a run resumed in a new folder has only the later lines
    return replace(result, history=[m for m in result.history if m["step"] > int(path.name[5:])])


def test_a_damaged_newest_is_passed_over(tmp_path, capfd):
    c = config(save_every=4)
    whole = run(c, out_dir=tmp_path)
    (tmp_path / "step_00000012" / "state.json").write_bytes(b"{}\n")
    assert same(run(c, out_dir=tmp_path, resume=True), whole)
    assert capfd.readouterr().err.count("step_00000012") == 1
    for path in list_checkpoints(tmp_path):
        (path / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="none of the"):
        run(c, out_dir=tmp_path, resume=True)


def test_resume_without_a_checkpoint_says_so(tmp_path, capfd):
    result = run(out_dir=tmp_path, resume=True)
    assert same(result, run()) and "starting at step 0" in capfd.readouterr().err


def test_other_runs_are_refused(tmp_path):
    run(out_dir=tmp_path)
    with pytest.raises(ValueError, match="earlier run"):
        run(out_dir=tmp_path)
    for c in (config(seed=1), config(steps=13), config(learning_rate=2e-3)):
        with pytest.raises(CheckpointError, match="there"):
            run(c, out_dir=tmp_path, resume=True)
    with pytest.raises(CheckpointError, match="data.fingerprint"):
        run(out_dir=tmp_path, resume=True, data=make_data(seed=1))
    assert run(config(log_every=3, save_every=7), out_dir=tmp_path, resume=True).step == 12


def test_a_constant_rate_may_go_on_longer(tmp_path):
    c = config(schedule="constant")
    run(c, out_dir=tmp_path)
    assert torch.equal(
        weights(run(replace(c, steps=20), out_dir=tmp_path, resume=True).model),
        weights(run(replace(c, steps=20)).model),
    )


# ---------------------------------------------------------------- kills and signals
def fork(work):
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
    finally:
        os._exit(0)


def wait_for(path, seconds=20.0):
    end = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.01)
    assert path.exists()


def check_kills(folder, n, seed):
    c, rng = config(steps=60, save_every=5), random.Random(seed)
    whole = run(c)
    for i in range(n):
        out = folder / str(i)
        while not (out / "model").exists():
            newest = list_checkpoints(out)[:1]
            pid = fork(lambda: run(c, out_dir=out, resume=True, model=make_model(delay=0.004)))
            while not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                if list_checkpoints(out)[:1] != newest:
                    break
                time.sleep(0.003)
            time.sleep(rng.uniform(0, 0.1))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        assert same(run(c, out_dir=out, resume=True), whole)


def test_kills_lose_nothing(tmp_path, capfd):
    check_kills(tmp_path, 2, seed=0)


@pytest.mark.slow
def test_30_kills_lose_nothing(tmp_path, capfd):
    check_kills(tmp_path, 30, seed=1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_stop(tmp_path, number):
    c = config(steps=400)

    def work():
        result = run(c, out_dir=tmp_path, model=make_model(delay=0.02))
        (tmp_path / "stopped").write_text(f"{result.stopped} {result.step}")

    pid = fork(work)
    wait_for(tmp_path / "metrics.jsonl")
    time.sleep(0.3)
    began = time.monotonic()
    os.kill(pid, number)
    os.waitpid(pid, 0)
    assert time.monotonic() - began < 10
    name, step = (tmp_path / "stopped").read_text().split()
    assert name == number.name and find_checkpoint(tmp_path).step == int(step) < 400
    assert not (tmp_path / "model").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert same(run(c, out_dir=tmp_path, resume=True), run(c))


def test_two_runs_one_folder(tmp_path):
    pid = fork(lambda: run(config(steps=1000), out_dir=tmp_path, model=make_model(delay=0.02)))
    wait_for(tmp_path / "metrics.jsonl")
    began = time.monotonic()
    with pytest.raises(CheckpointError, match=f"process {pid} "):
        run(out_dir=tmp_path)
    assert time.monotonic() - began < 5
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert run(out_dir=tmp_path).step == 12


# ---------------------------------------------------------------- values that are not finite
def bad_loss(steps, value=math.nan):
    def loss(model, batch):
        good = joint_loss_fn(model, batch)
        return replace(good, total=good.total * value) if batch.step in steps else good

    return loss


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_bad_loss_changes_nothing(value):
    result = run(loss_fn=bad_loss({4, 5, 8}, value))
    assert result.skipped == 3 and result.step == 12 and weights(result.model).isfinite().all()
    assert all(math.isfinite(v) for m in result.history for v in m.values())
    trainer = tr.Trainer(
        make_model(), DATA, config=config(), loss_fn=bad_loss({1}, value), device="cpu"
    )
    tr.train_step(trainer, trainer.data[0])
    before = (
        weights(trainer.model),
        trainer.optimizer.state_dict()["state"][0]["exp_avg"].clone(),
        trainer.ema.shadow_params[0].clone(),
        trainer.ema.optimization_step,
    )
    assert not tr.train_step(trainer, trainer.data[1])
    after = (
        weights(trainer.model),
        trainer.optimizer.state_dict()["state"][0]["exp_avg"],
        trainer.ema.shadow_params[0],
        trainer.ema.optimization_step,
    )
    assert all(torch.equal(a, b) for a, b in zip(before[:3], after[:3])) and before[3] == after[3]


def test_a_bad_gradient_changes_nothing():
    model = make_model()
    planted = []

    def poison(grad):
        planted.append(1)
        return grad * math.nan if len(planted) == 3 else grad

    model.audio.weight.register_hook(poison)
    result = run(model=model)
    assert result.skipped == 1 and weights(result.model).isfinite().all()


class Sick:
    "A data set that did not check one of its clips."

    def __init__(self, bad):
        self.bad, self.ids, self.fingerprint = bad, DATA.ids, "sick"

    def __len__(self):
        return len(DATA)

    def batch(self, indices):
        video, audio = (x.clone() for x in DATA.batch(indices))
        for place, i in enumerate(indices):
            if i in self.bad:
                audio[place, 0, 0] = math.nan
        return video, audio


def test_a_bad_clip_is_skipped_or_named(tmp_path):
    result = run(config(batch_size=1, steps=22), data=Sick({7}))
    assert result.skipped == 2 and weights(result.model).isfinite().all()
    with pytest.raises(TrainError, match=r"step 2 \(clips .*clip\d+.*\)"):
        run(data=Sick(set(range(11))), out_dir=tmp_path)
    assert not list_checkpoints(tmp_path)


def test_skips_in_a_row_survive_a_resume(tmp_path):
    c = config(save_every=6)

    def loss(model, batch):
        return bad_loss({4, 5, 6, 7})(model, batch)

    with pytest.raises(TrainError, match="step 6"):
        run(c, loss_fn=loss, out_dir=tmp_path)
    with pytest.raises(TrainError, match="step 6"):
        run(c, loss_fn=loss, out_dir=tmp_path, resume=True)


# ---------------------------------------------------------------- memory, precision, processes
def test_out_of_memory_is_a_sentence(tmp_path):
    def loss(model, batch):
        if batch.step == 6:
            torch.empty(10**14)
        return joint_loss_fn(model, batch)

    loss.__name__ = "joint_loss_fn"
    with pytest.raises(TrainError) as error:
        run(config(save_every=5), loss_fn=loss, out_dir=tmp_path)
    text = str(error.value)
    for knob in ("batch_size", "gradient_accumulation", "smaller model"):
        assert knob in text
    assert "\n" not in text
    assert find_checkpoint(tmp_path).step == 5
    assert same(run(config(save_every=5), out_dir=tmp_path, resume=True), run())


def test_accumulation_and_the_order_of_processes():
    whole, parts = run(), run(config(gradient_accumulation=2))
    assert torch.allclose(weights(whole.model), weights(parts.model), atol=1e-6)
    c = config(gradient_accumulation=2)
    one = tr.StepData(DATA, c, num_train_steps=1000)[5]
    c = replace(c, gradient_accumulation=1)
    two = [tr.StepData(DATA, c, num_train_steps=1000, rank=r, world=2)[5][0] for r in (0, 1)]
    for a, b in zip(one, two):
        assert a.ids == b.ids and torch.equal(a.t, b.t)
        assert torch.equal(a.video_noise, b.video_noise)


def test_bf16_leaves_a_plain_model():
    model = make_model()
    result = run(config(mixed_precision="bf16"), model=model)
    out, _ = result.model(*DATA.batch([0]), torch.tensor([5]))
    assert out.dtype == torch.float32 and weights(model).dtype == torch.float32
    assert "forward" not in vars(result.model) and "forward" not in vars(result.ema_model)


def test_every_clip_once_per_epoch_and_levels_uniform():
    order = [tr.clip_index(p, n_clips=11, seed=3) for p in range(33)]
    assert all(sorted(order[i : i + 11]) == list(range(11)) for i in (0, 11, 22))
    for stratified in (True, False):
        t = torch.cat(
            [
                tr.draw_times(s, batch_size=8, num_train_steps=1000, seed=0, stratified=stratified)
                for s in range(2500)
            ]
        )
        counts = torch.bincount(t // 100, minlength=10)
        assert t.min() >= 0 and t.max() <= 999 and (counts - 2000).abs().max() < 200
    t = tr.draw_times(0, batch_size=8, num_train_steps=1000, seed=0)
    assert torch.equal(t.sort().values // 125, torch.arange(8))


def test_global_random_state_is_left_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train(Pair(), DATA, config=config(num_workers=0), device="cpu")
    torch.manual_seed(5)
    Pair()
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    Pair()
    assert torch.equal(torch.get_rng_state(), after)


def test_record_and_config():
    assert asdict(TrainConfig())["steps"] == 700_000 and json.dumps(TrainConfig.tiny().to_dict())
    for wrong in (
        {"steps": 0},
        {"keep": 2},
        {"batch_size": 1.5},
        {"schedule": "x"},
        {"learning_rate": "1"},
        {"learning_rate": math.nan},
        {"ema_decay": 2.0},
        {"seed": True},
        {"mixed_precision": "fp8"},
        {"num_workers": -1},
        {"progress": 1},
    ):
        with pytest.raises((TypeError, ValueError), match=next(iter(wrong))):
            TrainConfig(**wrong)
