"Faults that a training run must survive: stops, kills, NaN, full memory, other configurations."

import json
import math
import os
import random
import shutil
import signal
import time
import traceback
import warnings
from dataclasses import asdict, dataclass, replace

import pytest
import torch
from runs import lines, same, weights
from torch import nn
from torch.utils.checkpoint import checkpoint

from cmmd import train as tr
from cmmd.checkpoint import CheckpointError, find_checkpoint, list_checkpoints
from cmmd.core import make_generator
from cmmd.datasets import ClipDataset
from cmmd.train import TrainConfig, TrainError, joint_loss_fn, train
from cmmd.unet import CMMDUNet, UNetConfig


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
    except BaseException:
        traceback.print_exc()
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
        for _ in range(99):  # lives
            if (out / "model").exists():
                break
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


CUDA_FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB.\nAnd more lines")


@pytest.mark.parametrize("place", ["Accelerator.prepare", "EMAModel", "put_state", "export_model"])
def test_out_of_memory_outside_the_loop_is_a_sentence(tmp_path, monkeypatch, place):
    def full(*args, **kwargs):
        raise CUDA_FULL

    c = config(save_every=4, mixed_precision="bf16")
    if place == "put_state":
        run(c, out_dir=tmp_path)
    model = make_model()
    before = set(vars(model))
    monkeypatch.setattr(f"cmmd.train.{place}", full)
    with pytest.raises(TrainError, match="Tried to allocate 20 MiB.*; .*lower batch_size") as error:
        run(c, out_dir=tmp_path, model=model, resume=True)
    text = str(error.value)
    early = place in ("Accelerator.prepare", "EMAModel")
    assert "\n" not in text and ("before the first step" in text) == early
    assert set(vars(model)) == before and error.value.__context__ is None  # holds no tensors
    monkeypatch.undo()
    assert run(c, out_dir=tmp_path, resume=True).step == 12


def test_a_model_that_cannot_be_built_is_given_back():
    model = recomputed()
    before = set(vars(model)) | {"is_gradient_checkpointing"}
    c = config(gradient_checkpointing=True, mixed_precision="bf16", gradient_accumulation=3)
    with pytest.raises(ValueError, match="batch_size must be a multiple"):
        run(c, model=model)
    assert set(vars(model)) <= before and not model.is_gradient_checkpointing


@pytest.mark.parametrize(
    "error,full",
    [
        (MemoryError(), True),
        (torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
        (RuntimeError("CUDNN_STATUS_ALLOC_FAILED"), True),
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), False),
        (ValueError("CUDA error: out of memory"), False),
        (TrainError("process 1 of 2: can't allocate memory"), False),  # another's
    ],
)
def test_what_is_out_of_memory(error, full):
    assert tr.is_out_of_memory(error) is full


def test_what_all_know_is_not_told_again():
    def work():
        tr.share_error(Alone(), CUDA_FULL)

    with pytest.raises(TrainError) as error:
        tr.within_memory(work, config())
    assert error.value.shared
    del CUDA_FULL.shared
    with pytest.raises(TrainError) as error:
        tr.within_memory(lambda: torch.empty(10**14), config())
    assert not error.value.shared


class Alone:
    num_processes = 1


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


class Noting(Pair):
    "Writes down whether each of its forward passes is in half precision."

    seen = []

    def forward(self, video, audio, t):
        Noting.seen.append(torch.is_autocast_enabled("cpu"))
        return super().forward(video, audio, t)


def test_every_run_of_a_model_is_in_half_precision():
    model, c = Noting(), config(mixed_precision="bf16", steps=2)
    before, result = set(vars(model)), None
    for average in (False, False, True):  # the last one goes on with the averaged weights
        Noting.seen.clear()
        result = run(c, model=result.ema_model if average else model)
        assert Noting.seen == [True, True]
        assert set(vars(result.model)) == set(vars(result.ema_model)) == before
    tr.Trainer(model, DATA, config=config(mixed_precision="no"), device="cpu")  # never released
    Noting.seen.clear()
    run(c, model=model)
    assert Noting.seen == [True, True] and set(vars(model)) == before


CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    "asked,device,real,told_cpu,picked",
    [
        ("auto", CPU, True, None, "no"),
        ("auto", GPU, True, None, "bf16"),
        ("auto", GPU, False, None, "fp16"),  # emulated bf16 is slower than float32
        ("auto", GPU, True, "true", "no"),  # accelerate launch --cpu
        ("auto", GPU, True, "false", "bf16"),
        ("fp16", GPU, True, None, "fp16"),
        ("fp16", GPU, True, "1", ValueError),
        ("fp16", CPU, True, None, ValueError),
        ("bf16", GPU, False, None, "bf16"),
        ("no", GPU, True, None, "no"),
        ("fp8", GPU, True, None, ValueError),
    ],
)
def test_which_precision(monkeypatch, asked, device, real, told_cpu, picked):
    def is_bf16_supported(including_emulation=True):
        return real or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    if told_cpu:
        monkeypatch.setenv("ACCELERATE_USE_CPU", told_cpu)
    if picked is ValueError:
        with pytest.raises(ValueError, match=f"mixed_precision .*{asked}"):
            tr.pick_precision(asked, device)
    else:
        assert tr.pick_precision(asked, device) == picked


@pytest.mark.parametrize(
    "machine,simd,rank,lines",
    [
        ("x86_64", "AVX2", None, 1),
        ("x86_64", "DEFAULT", "0", 1),
        ("AMD64", "AVX2", "1", 0),  # the main process speaks for all
        ("x86_64", "AVX512", None, 0),
        ("aarch64", "DEFAULT", None, 0),
    ],
)
def test_slow_half_precision_is_a_line(monkeypatch, machine, simd, rank, lines):
    monkeypatch.setattr(tr.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: simd)
    if rank:
        monkeypatch.setenv("RANK", rank)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert tr.pick_precision("bf16", CPU) == tr.pick_precision("bf16", GPU) == "bf16"
        assert tr.pick_precision("no", CPU) == tr.pick_precision("auto", CPU) == "no"
    assert len(said) == lines and all("AVX512" in str(w.message) for w in said)


def test_the_first_gpu_after_the_second(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(str(device)))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(tr, "Accelerator", lambda **given: given)
    for name in ("cuda:1", "cuda:0", "cuda", "cpu"):
        given = tr.make_accelerator(name)
        assert given["cpu"] == (name == "cpu")
        assert given["mixed_precision"] == ("no" if name == "cpu" else "bf16")
    assert chosen == ["cuda:1", "cuda:0"]


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
        {"gradient_checkpointing": 1},
        {"compile": "yes"},
        {"start_step": 700_000},
    ):
        with pytest.raises((TypeError, ValueError), match=next(iter(wrong))):
            TrainConfig(**wrong)
    with pytest.raises(ValueError, match="steps must be more than start_step 400000.* got 1000$"):
        TrainConfig.paper_contrastive(steps=1000)
    assert TrainConfig(steps=8, start_step=7).start_step == 7


# ---------------------------------------------------------------- switches: memory, speed
class Recomputed(Pair):
    "A model that can recompute, as diffusers' do."

    _supports_gradient_checkpointing = True
    is_gradient_checkpointing = False

    def enable_gradient_checkpointing(self):
        self.is_gradient_checkpointing = True

    def disable_gradient_checkpointing(self):
        self.is_gradient_checkpointing = False

    def forward(self, *inputs):
        if not self.is_gradient_checkpointing:
            return super().forward(*inputs)
        return checkpoint(super().forward, *inputs, use_reentrant=False)


def recomputed():
    torch.manual_seed(0)
    return Recomputed()


def test_checkpointing_changes_no_bit_and_may_be_switched(tmp_path):
    plain, c = run(), config(gradient_checkpointing=True, save_every=6)
    result = run(c, model=recomputed())
    assert same(result, plain) and not result.model.is_gradient_checkpointing
    with pytest.raises(Stop):
        run(c, model=recomputed(), out_dir=tmp_path, loss_fn=stopping_at(6))
    c = replace(c, gradient_checkpointing=False)
    assert same(run(c, model=recomputed(), out_dir=tmp_path, resume=True), plain)
    with pytest.raises(ValueError, match="gradient_checkpointing .* Pair"):
        run(config(gradient_checkpointing=True))


def small_network():
    torch.manual_seed(0)
    sizes = dict(video_channels=(8, 16), audio_channels=(80, 96), n_blocks=1, head_dim=8)
    return CMMDUNet(UNetConfig.tiny(**sizes, time_embed_dim=32))


def network_data():
    g = make_generator(0, "network data")
    clip = small_network().config.clip
    sizes = (clip.video_shape, clip.audio_shape)
    video, audio = (torch.randn(4, *size, generator=g) for size in sizes)
    return ClipDataset(video, audio, tuple("abcd"), 0.0, 1.0)


def test_checkpointing_the_real_network():
    c = config(steps=2, batch_size=2, learning_rate=1e-2)
    results = []
    for changes in ({}, {"gradient_checkpointing": True}):
        c = replace(c, **changes)
        results.append(run(c, model=small_network(), data=network_data()))
    assert same(*results) and not results[1].model.is_gradient_checkpointing
    assert not torch.equal(weights(results[0].model), weights(small_network()))


def test_compile_leaves_a_plain_model(tmp_path, monkeypatch):
    compiled, real = [], nn.Module.compile

    def read_only(self):  # as the compiler reads the network, without waiting for its code
        compiled.append(self)
        real(self, backend="eager")

    monkeypatch.setattr(nn.Module, "compile", read_only)
    model = make_model()
    result = run(config(compile=True), model=model, out_dir=tmp_path)
    assert compiled == [model] and "_compiled_call_impl" not in vars(result.model)
    assert "_compiled_call_impl" not in vars(result.ema_model)
    assert torch.allclose(weights(result.model), weights(run().model), atol=1e-6)
    assert [*result.model.state_dict()] == [*make_model().state_dict()]
    with pytest.raises(CheckpointError, match="train.compile: True there, False here"):
        run(out_dir=tmp_path, resume=True)


@pytest.mark.slow
def test_compiled_is_nearly_equal():
    a, b = run(), run(config(compile=True))
    assert torch.allclose(weights(a.model), weights(b.model), atol=1e-6)


# ---------------------------------------------------------------- fp16: the scale of the loss
def scaled_trainer(scale=2.0**24, ceiling=65504.0, loss_fn=joint_loss_fn):
    "As under fp16, but computed in float32: gradients above the ceiling are infinite."
    trainer = tr.Trainer(make_model(), DATA, config=config(), loss_fn=loss_fn, device="cpu")
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    for p in trainer.params:
        p.register_hook(lambda g: g.where(g.abs() < ceiling, math.inf))
    return trainer


def test_an_overflow_is_no_bad_step():
    trainer, plain = scaled_trainer(), tr.Trainer(make_model(), DATA, config=config(), device="cpu")
    before, n = weights(trainer.model), 0
    while not tr.train_step(trainer, trainer.data[trainer.step]):
        n += 1
        assert torch.equal(weights(trainer.model), before) and not trainer.optimizer.state
    assert n > 3 and trainer.overflows == n and trainer.step == n + 1
    assert trainer.skipped == trainer.bad_in_row == 0
    assert trainer.accelerator.scaler.get_scale() == 2.0 ** (24 - n)
    plain.step = n
    tr.train_step(plain, plain.data[n])
    assert torch.equal(weights(trainer.model), weights(plain.model))
    line, reference = (tr.interval_metrics(t, seconds=1.0) for t in (trainer, plain))
    assert line["overflows"] == n and line["loss_scale"] == 2.0 ** (24 - n)
    assert line["grad_norm"] == reference["grad_norm"] and "loss_scale" not in reference


def test_nan_under_a_scale_ends_the_run():
    trainer = scaled_trainer(scale=2.0, loss_fn=bad_loss({0, 1, 2}))
    with pytest.raises(TrainError, match="3 steps in a row"):
        for step in range(3):
            tr.train_step(trainer, trainer.data[step])
    trainer = scaled_trainer(scale=4.0, ceiling=0.0)  # never finite: the scale cannot help
    with pytest.raises(TrainError, match="3 steps in a row, the last step 4"):
        for step in range(20):
            assert not tr.train_step(trainer, trainer.data[step])
    assert trainer.overflows == 2


def test_the_scale_is_resumed(tmp_path):
    trainer, again = scaled_trainer(), scaled_trainer()
    for step in range(10):
        tr.train_step(trainer, trainer.data[step])
    tr.save_run(trainer, tmp_path)
    assert tr.load_run(again, tmp_path) and again.overflows == trainer.overflows > 0
    for t in (trainer, again):
        for step in (10, 11):
            assert tr.train_step(t, t.data[step])
    states = [t.accelerator.scaler.state_dict() for t in (trainer, again)]
    assert states[0] == states[1] and torch.equal(weights(trainer.model), weights(again.model))


def test_fp16_needs_a_gpu():
    with pytest.raises(ValueError, match="mixed_precision 'fp16' needs a CUDA GPU, got the .* cpu"):
        run(config(mixed_precision="fp16"))


# ---------------------------------------------------------------- watching
HELD = make_data(n=5, seed=7)


def test_watching_changes_nothing(tmp_path):
    seen = []

    def show(model, board, step):
        seen.append((model.training, step, weights(model)))

    c = config(save_every=4)
    watched = run(c, out_dir=tmp_path, held_out=HELD, show=show)
    plain = run(c)
    assert torch.equal(weights(watched.model), weights(plain.model))
    assert torch.equal(weights(watched.ema_model), weights(plain.ema_model))
    assert [(training, step) for training, step, _ in seen] == [(False, 4), (False, 8), (False, 12)]
    assert torch.equal(seen[-1][2], weights(watched.ema_model))
    names = {"held_out_video", "held_out_audio", "gap_video", "gap_audio"}
    judged = [m for m in watched.history if names <= set(m)]
    assert [m["step"] for m in judged] == [4, 8, 12] and all("loss" in m for m in judged)
    assert [m["step"] for m in watched.history] == [4, 5, 8, 10, 12]
    alone = tr.validation_loss(watched.ema_model, HELD, n_batches=2, batch_size=4)
    assert judged[-1]["held_out_video"] == alone["video"]
    with pytest.raises(TypeError, match="onlog"):
        run(onlog=print)


def test_watched_runs_resume_exactly(tmp_path):
    c = config(save_every=4)
    whole = run(c, held_out=HELD)
    with pytest.raises(Stop):
        run(c, out_dir=tmp_path, held_out=HELD, loss_fn=stopping_at(9))
    assert same(run(c, out_dir=tmp_path, held_out=HELD, resume=True), whole)


def test_a_picture_that_fails_is_a_line(tmp_path, capfd):
    def show(model, board, step):
        raise ValueError("no video to show\nat all")

    result = run(config(save_every=6), out_dir=tmp_path, show=show)
    assert result.step == 12 and list_checkpoints(tmp_path)[0].name == "step_00000012"
    assert capfd.readouterr().err.count("no pictures at step") == 2


def test_a_signal_cuts_pictures_short(tmp_path):
    def show(model, board, step):
        signal.raise_signal(signal.SIGTERM)
        time.sleep(60)

    began = time.monotonic()
    result = run(config(save_every=4), out_dir=tmp_path, show=show)
    assert result.stopped == "SIGTERM" and result.step == 4 and time.monotonic() - began < 10
    assert find_checkpoint(tmp_path).step == 4
    assert same(run(config(save_every=4), out_dir=tmp_path, resume=True), run())


def test_bands_are_means_of_their_clips():
    c, each = config(steps=3, log_every=3, gradient_accumulation=2), []

    def loss(model, batch):
        good = joint_loss_fn(model, batch)
        each.extend(zip(batch.t.tolist(), good.video.tolist(), good.audio.tolist()))
        return good

    line = run(c, loss_fn=loss).history[-1]
    for k in range(4):
        here = [x for x in each if x[0] // 250 == k]
        for place, name in ((1, "video"), (2, "audio")):
            mean = sum(x[place] for x in here) / len(here)
            assert math.isclose(line[f"{name}_t{250 * k}"], mean, rel_tol=1e-5)
    assert 0 < line["memory"] < 100


# ---------------------------------------------------------------- old checkpoints, other processes
def test_a_checkpoint_of_before_the_switches(tmp_path, monkeypatch):
    c, real = config(save_every=6), tr.save_checkpoint

    def as_before(out_dir, step, *, tensors, state, config, keep):
        settings = {k: v for k, v in config["train"].items() if k not in NEW}
        state = {k: v for k, v in state.items() if k not in NEWER}
        config = {**config, "train": settings}
        return real(out_dir, step, tensors=tensors, state=state, config=config, keep=keep)

    NEW, NEWER = ("gradient_checkpointing", "compile"), ("overflows", "processes", "precision")
    monkeypatch.setattr(tr, "save_checkpoint", as_before)
    with pytest.raises(Stop):
        run(c, out_dir=tmp_path, loss_fn=stopping_at(6))
    monkeypatch.undo()
    assert same(run(c, out_dir=tmp_path, resume=True), run())
    with pytest.raises(CheckpointError, match="train.compile: False there, True here"):
        run(replace(c, compile=True), out_dir=tmp_path, resume=True)


def test_another_precision_is_a_line(tmp_path, monkeypatch, capfd):
    c, real = config(save_every=6), tr.pick_precision
    monkeypatch.setattr(tr, "pick_precision", lambda *_: "bf16")  # as on a GPU
    with pytest.raises(Stop):
        run(c, out_dir=tmp_path, loss_fn=stopping_at(6))
    monkeypatch.setattr(tr, "pick_precision", real)
    assert find_checkpoint(tmp_path).state["precision"] == "bf16"
    assert run(c, out_dir=tmp_path, resume=True).step == 12
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "precision was bf16, is no: " in err and "bit for bit" in err
    assert run(c, out_dir=tmp_path, resume=True).step == 12  # from step 12: the same
    assert capfd.readouterr().err == ""
    with pytest.raises(CheckpointError, match="train.mixed_precision: 'auto' there, 'no' here"):
        run(replace(c, mixed_precision="no"), out_dir=tmp_path, resume=True)


def test_pieces_may_move_between_processes(tmp_path, monkeypatch, capfd):
    real = tr.save_checkpoint

    def of_two(out_dir, step, *, state, **kwargs):
        return real(out_dir, step, state={**state, "processes": 2}, **kwargs)

    monkeypatch.setattr(tr, "save_checkpoint", of_two)
    with pytest.raises(Stop):
        run(config(save_every=6), out_dir=tmp_path, loss_fn=stopping_at(6))
    monkeypatch.undo()
    assert (
        run(config(save_every=6, gradient_accumulation=2), out_dir=tmp_path, resume=True).step == 12
    )
    assert "rounded" not in capfd.readouterr().err
    for path in list_checkpoints(tmp_path)[:1]:
        shutil.rmtree(path)
    assert run(config(save_every=6), out_dir=tmp_path, resume=True).step == 12
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "saved by 2 processes, this run has 1" in err
    for path in list_checkpoints(tmp_path)[:1]:
        shutil.rmtree(path)
    with pytest.raises(CheckpointError, match="gradient_accumulation"):
        run(config(save_every=6, gradient_accumulation=4), out_dir=tmp_path, resume=True)


@pytest.mark.parametrize("name", ["ema_updates", "sums", "optimizer"])
def test_a_state_that_does_not_fit_is_passed_over(tmp_path, monkeypatch, capfd, name):
    real = tr.save_checkpoint

    def lame(out_dir, step, *, state, **kwargs):
        if step == 8:
            state = {k: v for k, v in state.items() if k != name}
        return real(out_dir, step, state=state, **kwargs)

    monkeypatch.setattr(tr, "save_checkpoint", lame)
    c = config(save_every=4)
    with pytest.raises(Stop):
        run(c, out_dir=tmp_path, loss_fn=stopping_at(8))
    monkeypatch.undo()
    assert same(run(c, out_dir=tmp_path, resume=True), run())
    assert capfd.readouterr().err.count("damaged checkpoint passed over") == 1


# ---------------------------------------------------------------- disks and other processes
def test_a_full_disk_under_the_log_is_a_line(tmp_path, monkeypatch):
    def full(self, text):
        raise OSError(28, "No space left on device")

    class Full:
        write, flush, close = full, full, lambda self: full(self, "")

    real = tr.RunLog.__init__

    def start(self, out_dir, step):
        real(self, out_dir, step)
        self.file = Full()

    monkeypatch.setattr(tr.RunLog, "__init__", start)
    with pytest.raises(TrainError, match="metrics.jsonl: No space left on device") as error:
        run(config(save_every=4), out_dir=tmp_path)
    assert "\n" not in str(error.value) and find_checkpoint(tmp_path).step == 4
    monkeypatch.undo()
    assert same(run(config(save_every=4), out_dir=tmp_path, resume=True), run())


class Two:
    "An accelerator of two processes, as the second of them sees it; the first says `told`."

    num_processes, process_index, is_main_process = 2, 1, False
    device = torch.device("cpu")

    def __init__(self, told=b""):
        self.told = told

    def gather(self, mine):
        row = torch.zeros_like(mine)
        row[0, : len(self.told)] = torch.tensor(list(self.told), dtype=torch.uint8)
        return torch.cat([row, mine])


def test_an_error_of_another_process_is_quoted():
    tr.share_error(Two(), None)
    with pytest.raises(TrainError, match="^process 0 of 2: cannot write x: No space left$"):
        tr.share_error(Two("cannot write x: No space left".encode()), None)
    mine = CheckpointError("my own\nsecond line")
    with pytest.raises(CheckpointError, match="my own") as error:
        tr.share_error(Two(b"other"), mine)
    assert error.value is mine and mine.shared
    with pytest.raises(TrainError, match="process 0 of 2: in use"):
        tr.on_main(Two(b"in use"), lambda: 1 / 0)  # only the main process works


@pytest.mark.parametrize(
    "error,gone",
    [
        (RuntimeError("[/gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]:1"), True),
        (RuntimeError("NCCL communicator was aborted on rank 1."), True),
        (torch.distributed.DistNetworkError("Broken pipe"), True),
        (RuntimeError("shapes differ"), False),
        (ValueError("gloo"), False),
        (MemoryError(), False),
    ],
)
def test_who_has_gone(error, gone):
    assert tr.is_gone(error) is gone


# ---------------------------------------------------------------- going on
def test_tensorboard_keeps_every_line_of_a_resumed_run(tmp_path):
    board = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    c = config(save_every=4, log_every=4)
    with pytest.raises(Stop):
        run(c, out_dir=tmp_path, on_log=stop_behind(8))
    run(c, out_dir=tmp_path, resume=True)
    run(c, out_dir=tmp_path, resume=True)  # nothing is left to do
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    events = board.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [m["step"] for m in lines] == [4, 8, 12]
    assert [e.step for e in events.Scalars("loss")] == [4, 8, 12]


def stop_behind(step):
    def stop(metrics):
        if metrics["step"] > step:
            raise Stop

    return stop


def test_resuming_a_finished_run_leaves_its_record(tmp_path):
    run(config(), out_dir=tmp_path)
    record = tmp_path / "model" / "training.json"
    before = record.read_bytes()
    assert run(config(), out_dir=tmp_path, resume=True).step == 12
    assert record.read_bytes() == before
    record.unlink()
    run(config(), out_dir=tmp_path, resume=True)
    assert json.loads(record.read_text())["steps"] == 12


def test_a_finished_run_can_be_lengthened_where_the_rate_allows_it(tmp_path):
    run(config(schedule="constant"), out_dir=tmp_path / "constant")
    again = run(config(schedule="constant", steps=16), out_dir=tmp_path / "constant", resume=True)
    assert again.step == 16
    run(config(schedule="cosine"), out_dir=tmp_path / "cosine")
    with pytest.raises(CheckpointError, match="train.steps: 12 there, 16 here .a cosine ends"):
        run(config(schedule="cosine", steps=16), out_dir=tmp_path / "cosine", resume=True)
