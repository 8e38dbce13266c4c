"The plan of a run against what a run really takes."

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from project import ENVIRONMENT
from torch._subclasses.fake_tensor import FakeTensorMode

from cmmd import scale
from cmmd.contrastive import ContrastiveConfig, ContrastiveLossFn
from cmmd.datasets import ClipDataset
from cmmd.scale import (
    activation_bytes,
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
