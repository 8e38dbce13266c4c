"The plan of a run against what a run really takes."

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from project import ENVIRONMENT
from torch._subclasses.fake_tensor import FakeTensorMode

import cmmd.train
from cmmd import scale
from cmmd.contrastive import ContrastiveConfig, ContrastiveLossFn
from cmmd.datasets import ClipDataset
from cmmd.scale import (
    activation_bytes,
    device_memory,
    forward_flops,
    memory_parts,
    plan_run,
    ring_bytes,
    step_flops,
    step_seconds,
)
from cmmd.train import TrainConfig, Trainer, train_step
from cmmd.unet import CMMDUNet, UNetConfig

TINY, SMALL = UNetConfig.tiny(), UNetConfig.small()
LEAST = UNetConfig.tiny(
    video_channels=(16, 32), audio_channels=(80, 96), n_blocks=1, head_dim=16, time_embed_dim=64
)


def inputs(config, n):
    clip = config.clip
    return (
        torch.zeros(n, *clip.video_shape),
        torch.zeros(n, *clip.audio_shape),
        torch.zeros(n, dtype=torch.int64),
    )


def make_clips(config, n=4):
    g = torch.Generator().manual_seed(0)
    names = tuple(map(str, range(n)))
    shapes = config.clip.video_shape, config.clip.audio_shape
    return ClipDataset(*(torch.randn(n, *s, generator=g) for s in shapes), names, 0.0, 1.0)


def make_trainer(config, *, negatives=0, **changes):
    torch.manual_seed(0)
    loss = ContrastiveLossFn(
        ContrastiveConfig(
            weight=0.01 * bool(negatives), negatives="swap", n_negatives=max(1, negatives)
        )
    )
    c = TrainConfig.tiny(**changes)
    return Trainer(CMMDUNet(config), make_clips(config), config=c, loss_fn=loss, device="cpu")


# ---------------------------------------------------------------- activations
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("config", [LEAST, SMALL], ids=["least", "small"])
def test_fake_tensors_count_what_a_real_pass_saves(config, checkpointing):
    def counted():
        model = CMMDUNet(config).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        return activation_bytes(model, *inputs(config, 1))

    real = counted()
    with FakeTensorMode():
        assert counted() == real


def test_a_pass_that_is_counted_changes_nothing():
    torch.manual_seed(0)
    model = CMMDUNet(LEAST).train()
    model.enable_gradient_checkpointing()
    before = model._gradient_checkpointing_func
    activation_bytes(model, *inputs(LEAST, 1))
    assert model._gradient_checkpointing_func == before
    assert all(p.grad is None for p in model.parameters())


def test_counting_draws_no_random_number():
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    memory_parts(LEAST, batch_size=3)
    forward_flops(LEAST), step_flops(LEAST, pairs=1)
    step_seconds(LEAST, device="cpu", repeats=1)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_building_a_network_looks_at_no_gpu(monkeypatch):
    "Reading each GPU's random state would initialise all of them."
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_rng_state", None)  # it must not be asked
    monkeypatch.setattr(torch.cuda, "set_rng_state", None)
    assert min(step_seconds(LEAST, device="cpu", repeats=1)) > 0


# ---------------------------------------------------------------- a GPU's rules, without a GPU
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_are_float32_by_cuda_s_rules(dtype):
    "A norm keeps a copy of its input and gives float32, which the next layer keeps."
    found = {}
    for device in ("cpu", "cuda"):
        with FakeTensorMode(), torch.device(device):
            layers = torch.nn.Sequential(torch.nn.GroupNorm(4, 100), torch.nn.SiLU())
            x = torch.zeros(64, 100, 10, dtype=dtype)
            found[device] = activation_bytes(layers, x, dtype=dtype)
    statistics = 2 * 64 * 4  # a mean and a deviation of each clip's groups
    assert found["cuda"] == 2 * 64_000 * 4 + 4 * statistics
    assert 2 * 64_000 * 2 < found["cpu"] <= 2 * 64_000 * 2 + 4 * statistics


def test_float32_needs_little_more_by_cuda_s_rules():
    for again in (False, True):
        cpu, cuda = (
            memory_parts(SMALL, batch_size=2, gradient_checkpointing=again, device=device)
            for device in ("cpu", "cuda")
        )
        assert 1 < cuda.activations / cpu.activations < 1.15 and cuda.weights == cpu.weights


@pytest.mark.parametrize("fusion", ["easy", "cross_attention"])
def test_attention_on_a_gpu_keeps_no_weight_for_each_pair_of_places(fusion):
    "As on the CPU, whose kernel keeps none either: the plain form would need much more."
    large = UNetConfig.tiny(fusion=fusion, clip=replace(TINY.clip, frame_size=256))
    cpu, cuda = (
        memory_parts(large, batch_size=1, device=device).activations for device in ("cpu", "cuda")
    )
    assert 0.95 < cuda / cpu < 1.1


def test_autocast_is_as_before_also_after_an_error():
    def state():
        return [
            (torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in ("cpu", "cuda")
        ]

    before = state()
    memory_parts(LEAST, batch_size=1, mixed_precision="fp16", device="cuda")
    assert state() == before
    for device in ("cpu", "cuda"):
        with FakeTensorMode(), torch.device(device), pytest.raises(IndexError):
            activation_bytes(torch.nn.Flatten(7), torch.zeros(2, 5), dtype=torch.float16)
        assert state() == before
    with torch.autocast("cpu", torch.bfloat16):
        inside = state()
        memory_parts(LEAST, batch_size=2, device="cuda")
        assert state() == inside


FORK = """
import os
import torch
from cmmd.scale import memory_parts, step_flops
from cmmd.unet import UNetConfig

def backward(): torch.ones(2, requires_grad=True).sum().backward()

with torch.no_grad():
    for device in ("cpu", "cuda"): memory_parts(UNetConfig.tiny(), batch_size=1, device=device)
step_flops(UNetConfig.tiny(), pairs=1)
backward()
child = os.fork()
if not child:
    try: backward()
    except RuntimeError: os._exit(7)
    os._exit(0)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.skipif(torch.cuda.is_available(), reason="autograd has a thread for a real GPU")
def test_a_fork_after_a_count_may_compute_gradients():
    env = {**os.environ, **ENVIRONMENT}
    done = subprocess.run([sys.executable, "-c", FORK], env=env, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()[-2000:]


# ---------------------------------------------------------------- the parts of a real trainer
def test_parts_are_those_of_a_trainer():
    trainer = make_trainer(LEAST, batch_size=1)
    train_step(trainer, trainer.data[0])
    parts = memory_parts(LEAST, batch_size=1)

    def size(tensors):
        return sum(
            s.nbytes() for s in {t.data_ptr(): t.untyped_storage() for t in tensors}.values()
        )

    states = trainer.optimizer.state.values()
    moments = [x for s in states for x in s.values() if x.ndim]
    assert size(trainer.model.parameters()) == parts.weights
    assert size(p.grad for p in trainer.params) == parts.gradients
    assert size(moments) == parts.optimizer
    assert size([*trainer.ema_model.parameters(), *trainer.ema.shadow_params]) == parts.ema


CASES = [  # network, batch, negatives, recomputed, precision
    ("tiny", 8, 0, False, "no"),
    ("tiny", 4, 1, True, "no"),
    ("small", 2, 0, False, "no"),
]
MORE = [
    ("tiny", 8, 0, False, "bf16"),
    ("tiny", 8, 1, False, "no"),
    ("small", 4, 1, True, "no"),
]
CHILD = """
import gc, json, os, re, sys
from pathlib import Path
import torch
from test_scale import LEAST, make_trainer
from cmmd.train import train_step
from cmmd.unet import UNetConfig

def resident(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def step(config, batch, negatives, again, precision):
    trainer = make_trainer(config, negatives=negatives, batch_size=batch,
                           mixed_precision=precision, gradient_checkpointing=again)
    for p in trainer.params: p.grad = torch.zeros_like(p)
    trainer.optimizer.step()  # Adam's moments are there from now on
    trainer.optimizer.zero_grad(set_to_none=True)
    train_step(trainer, trainer.data[0])

for name, *case in json.loads(sys.argv[1]):
    if os.fork() == 0:  # a process of its own, which has imported everything
        step(LEAST, 1, 1, True, case[-1])  # libraries and their buffers
        gc.collect()
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        step(getattr(UNetConfig, name)(), *case)
        print(resident("VmHWM") - before, flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.parametrize(
    "cases", [CASES, pytest.param(MORE, marks=pytest.mark.slow)], ids=["few", "more"]
)
def test_total_is_the_peak_of_a_real_step(cases):
    "Memory that is freed goes back to the system at once here, so that the peak is torch's own."
    env = {**os.environ, **ENVIRONMENT, "MALLOC_MMAP_THRESHOLD_": "65536"}
    env["PYTHONPATH"] = str(Path(__file__).parent)
    command = [sys.executable, "-c", CHILD, json.dumps(cases)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    peaks = done.stdout.split()
    assert len(peaks) == len(cases), done.stderr[-2000:]
    for (name, batch, negatives, again, precision), peak in zip(cases, peaks):
        parts = memory_parts(
            getattr(UNetConfig, name)(),
            batch_size=batch,
            negatives=negatives,
            gradient_checkpointing=again,
            mixed_precision=precision,
        )
        case = f"{name} {batch} {negatives} {again} {precision}: {int(peak) / parts.total:.2f}"
        print(case)
        assert 0.8 < int(peak) / parts.total < 1.2, case


def test_the_contrastive_batch_fits_when_it_is_recomputed():
    "Contrastive batches cost three plain ones; recomputed, 8 clips need less than 8 plain ones."
    paper = UNetConfig.paper()
    plain = memory_parts(paper, batch_size=8).activations
    contrastive = memory_parts(paper, batch_size=8, negatives=1).activations
    again = memory_parts(paper, batch_size=8, negatives=1, gradient_checkpointing=True).activations
    assert abs(contrastive / plain - 3) < 0.01 and again < plain


def test_other_processes_cost_buckets_and_negatives_cost_pairs():
    one, two = (memory_parts(LEAST, batch_size=2, processes=n) for n in (1, 2))
    assert one.buckets == 0 and two.total - one.total == two.buckets == two.weights
    pairs = memory_parts(LEAST, batch_size=6).activations
    assert memory_parts(LEAST, batch_size=2, negatives=1).activations == pairs


# ---------------------------------------------------------------- arithmetic
def test_flops():
    assert forward_flops(LEAST) == forward_flops(CMMDUNet(LEAST)) < forward_flops(TINY)
    assert 1.9 < forward_flops(LEAST, n_frames=36) / forward_flops(LEAST) < 2.1
    once, again = (step_flops(LEAST, pairs=1, gradient_checkpointing=x) for x in (False, True))
    assert 2.9 < once / forward_flops(LEAST) < 3 < again / forward_flops(LEAST) < 4
    assert step_flops(LEAST, pairs=6) == 6 * once


def test_ring():
    assert ring_bytes(100, 1) == 0 and ring_bytes(100, 2) == 100
    assert ring_bytes(100, 4) == 150 and ring_bytes(100, 10**6) < 200


# ---------------------------------------------------------------- the plan
def test_plan_adds_up():
    c = TrainConfig.tiny(steps=100, start_step=40, batch_size=8, gradient_accumulation=2)
    contrast = ContrastiveConfig(n_negatives=2)
    plan = plan_run(
        LEAST, c, contrast=contrast, processes=2, device="cpu", measure=False, data_clips=96
    )
    assert (plan.steps, plan.clips, plan.micro_batch, plan.pairs) == (60, 480, 2, 5)
    assert plan.memory == memory_parts(LEAST, batch_size=2, negatives=2, processes=2)
    assert plan.flops_per_step == step_flops(LEAST, pairs=40)
    assert plan.parameters == sum(p.numel() for p in CMMDUNet(LEAST).parameters())
    assert plan.needed == 2 * plan.memory.total and plan.fits and plan.seconds is None
    text = "\n".join(plan.lines())
    for part in ("5.0 epochs of 96", "5 pairs each", "2 processes", "not measured", "fits"):
        assert part in text
    assert max(map(len, plan.lines())) <= 125


def test_plan_without_a_contrastive_weight_has_no_negatives():
    c = TrainConfig.tiny()
    assert plan_run(LEAST, c, contrast=ContrastiveConfig(weight=0.0), measure=False).pairs == 1


def test_plan_that_does_not_fit_says_what_helps(monkeypatch):
    monkeypatch.setattr(scale, "device_memory", lambda device: 2**26)
    monkeypatch.setattr(scale, "step_seconds", None)  # it must not be tried
    plan = plan_run(LEAST, TrainConfig.tiny(batch_size=64), device="cpu")
    assert not plan.fits and plan.seconds is None and "DOES NOT FIT" in "\n".join(plan.lines())
    assert all(n < plan.memory.total for _, n in plan.knobs) and len(plan.knobs) == 4
    assert min(n for _, n in plan.knobs) == dict(plan.knobs)["both"] < 2**26


def as_on_a_gpu(monkeypatch, free, seconds):
    "A GPU with so many bytes free and 80 GiB in all; `seconds` stands for `step_seconds`."
    monkeypatch.setattr(scale, "pick_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(scale, "pick_precision", lambda name, where: "bf16")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 * 2**30))
    monkeypatch.setattr(scale, "step_seconds", seconds)


def test_a_gpu_has_what_is_free_less_1_gib(monkeypatch):
    as_on_a_gpu(monkeypatch, 5 * 2**30, None)
    assert device_memory() == 4 * 2**30
    as_on_a_gpu(monkeypatch, 2**20, None)
    assert device_memory() == 0


def test_a_plan_for_a_gpu(monkeypatch):
    asked = []

    def seconds(config, **how):
        asked.append(how)
        return 0.5, 0.1

    as_on_a_gpu(monkeypatch, 5 * 2**30, seconds)
    plan = plan_run(LEAST, TrainConfig.tiny(steps=10, batch_size=8, gradient_accumulation=2))
    parts = memory_parts(LEAST, batch_size=4, mixed_precision="bf16", device="cuda")
    assert plan.memory == parts and plan.precision == "bf16" and plan.device == "cuda"
    assert asked[0]["pairs"] == 4 and plan.seconds_per_step == 0.5 * 2 + 0.1
    assert "of 4.00 GiB, free less 1 GiB for CUDA itself)" in "\n".join(plan.lines())
    assert max(map(len, plan.lines())) <= 125
    as_on_a_gpu(monkeypatch, parts.total + 2**30 - 1, None)  # a byte too few
    plan = plan_run(LEAST, TrainConfig.tiny(batch_size=4))
    assert not plan.fits and dict(plan.knobs)["both"] < parts.total


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_a_micro_step_that_runs_out_of_memory_is_a_line_of_the_plan(monkeypatch, error):
    def seconds(config, **how):
        raise error

    as_on_a_gpu(monkeypatch, 50 * 2**30, seconds)
    plan = plan_run(LEAST, TrainConfig.tiny(), data_clips=5)
    assert not plan.fits and plan.ran_out and plan.seconds_per_step is None and plan.knobs
    text = "\n".join(plan.lines())
    for part in (
        "DOES NOT FIT",
        "a micro-step was tried here and ran out of memory",
        "epochs of 5",
    ):
        assert part in text


def test_another_error_of_a_micro_step_is_not_hidden(monkeypatch):
    def seconds(config, **how):
        raise RuntimeError("no kernel image")

    as_on_a_gpu(monkeypatch, 50 * 2**30, seconds)
    with pytest.raises(RuntimeError, match="no kernel image"):
        plan_run(LEAST, TrainConfig.tiny())


@pytest.mark.parametrize("has, precision", [(True, "bf16"), (False, "fp16")])
def test_auto_is_what_the_trainer_makes_of_it(monkeypatch, has, precision):
    "A T4 has no units for bf16."
    picked = scale.pick_precision
    as_on_a_gpu(monkeypatch, 50 * 2**30, lambda config, **how: (1.0, 0.0))
    monkeypatch.setattr(scale, "pick_precision", picked)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *a, **k: has)
    assert plan_run(LEAST, TrainConfig.tiny()).precision == precision
    assert scale.pick_precision is cmmd.train.pick_precision


def test_plan_s_seconds_are_those_of_a_real_step(monkeypatch):
    "In CPU time, so that other programs on the machine do not count."
    monkeypatch.setattr(scale.time, "perf_counter", time.process_time)
    contrast = ContrastiveConfig(negatives="swap")
    plan = plan_run(LEAST, TrainConfig.tiny(batch_size=4), contrast=contrast, device="cpu")
    trainer = make_trainer(LEAST, negatives=1, batch_size=4)
    spent = []
    for i in range(4):
        start = time.process_time()
        train_step(trainer, trainer.data[i])
        spent.append(time.process_time() - start)
    assert 0.4 < min(spent) / plan.seconds_per_step < 2.5
    assert "measured here on cpu" in "\n".join(plan.lines())


@pytest.mark.parametrize(
    "call,error,word",
    [
        (lambda: memory_parts(LEAST, batch_size=0), ValueError, "batch_size"),
        (lambda: memory_parts(LEAST, batch_size=1.5), TypeError, "batch_size"),
        (lambda: memory_parts(LEAST, batch_size=1, negatives=-1), ValueError, "negatives"),
        (lambda: memory_parts(LEAST, batch_size=1, mixed_precision="int8"), ValueError, "int8"),
        (lambda: memory_parts(LEAST, batch_size=1, device="tpu"), ValueError, "device.*tpu"),
        (lambda: memory_parts({}, batch_size=1), TypeError, "config"),
        (lambda: step_flops("paper", pairs=1), TypeError, "config"),
        (lambda: step_seconds({}, device="cpu"), TypeError, "config"),
        (lambda: forward_flops("paper"), TypeError, "model_or_config"),
        (lambda: forward_flops(torch.nn.Linear(1, 1)), TypeError, "model_or_config"),
        (lambda: forward_flops(LEAST, n_frames=0), ValueError, "n_frames"),
        (lambda: step_flops(LEAST, pairs=True), TypeError, "pairs"),
        (lambda: ring_bytes(4, 0), ValueError, "processes"),
        (lambda: plan_run(LEAST, TrainConfig.tiny(), processes=3), ValueError, "multiple"),
        (lambda: plan_run("tiny", TrainConfig.tiny()), TypeError, "model_config"),
        (lambda: plan_run(LEAST, {}), TypeError, "train_config"),
        (lambda: plan_run(LEAST, TrainConfig.tiny(), contrast=1), TypeError, "contrast"),
        (
            lambda: plan_run(LEAST, TrainConfig.tiny(mixed_precision="fp16"), device="cpu"),
            ValueError,
            "CUDA",
        ),
    ],
)
def test_wrong_arguments_are_explained(call, error, word):
    with pytest.raises(error, match=word) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_what_cannot_be_counted_is_said():
    window = UNetConfig.tiny(fusion="window")
    for count in (
        lambda: memory_parts(window, batch_size=1),
        lambda: forward_flops(window),
        lambda: step_flops(window, pairs=1),
    ):
        with pytest.raises(ValueError, match="^fusion 'window' cannot be counted"):
            count()
