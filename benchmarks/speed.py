"""Speed of the parts on this machine (`make bench`): a table on the screen, JSON in a file.

    python benchmarks/speed.py [--size 64] [--threads 1] [--out runs/bench.json] [--history]

The paper's network is measured at batch 1 against ceilings and a naive build of the same run. On
the CPU a time is the process's own CPU time, since a neighbour's load stretches every other clock,
and a ratio is the median over rounds in which both sides take turns. 16 instead of 64 (latents of
16x16) is a quick look. Where there is CUDA, `gpu.py` adds its part. --history appends a line to
README.md.
"""

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import about_machine
from gpu import bench_gpu
from naive import naive_build
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cmmd.core import ClipSpec, make_generator, pick_device
from cmmd.guidance import generate
from cmmd.joint import joint_loss
from cmmd.mel import log_mel
from cmmd.toy import make_clips
from cmmd.unet import CMMDUNet, UNetConfig

SPEC = ClipSpec.toy()
# what we ask of UNetConfig.paper() at batch 1: (at most?, figure)
TARGETS = {
    "paper 64x64: operations of a forward": (True, 0.58),
    "paper 64x64: share of the conv ceiling": (False, 65),
    "paper 64x64: our build over the naive one": (False, 1.4),
    "paper 16x16: bf16 over fp32": (False, 2.0),
    "CUDA 16x16: guided step, captured over eager": (False, 3.0),
}
HISTORY = Path(__file__).parent / "README.md"


def seconds(run: Callable[[], object], *, device: torch.device, repeats: int = 5) -> float:
    "Median time of one call, after one to warm up: CPU time on the CPU, else the clock's."
    clock = time.process_time if device.type == "cpu" else time.perf_counter

    def once() -> float:
        start = clock()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return clock() - start

    return statistics.median([once() for _ in range(repeats + 1)][1:])


def take_turns(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    "CPU seconds of each run in each round; a first round is not counted when there are several."
    times = {name: [] for name in runs}
    for _ in range(rounds + (rounds > 1)):
        for name, run in runs.items():
            start = time.process_time()
            run()
            times[name].append(time.process_time() - start)
    return {name: t[rounds > 1 :] for name, t in times.items()}


def ratio(times: dict[str, list[float]], slow: str, fast: str) -> float:
    "Median over the rounds of how many times faster `fast` is."
    return statistics.median(a / b for a, b in zip(times[slow], times[fast]))


def tiny_inputs(config: UNetConfig, device: torch.device, *, batch: int) -> dict:
    "Random latents and mels of the toy clip's shapes."
    gen = make_generator(0)
    video = torch.randn(batch, *SPEC.video_shape, generator=gen)
    audio = torch.randn(batch, *SPEC.audio_shape, generator=gen)
    t = torch.randint(0, 1000, (batch,), generator=gen)
    return {"video": video.to(device), "audio": audio.to(device), "t": t.to(device)}


def bench_parts(device: torch.device) -> dict[str, tuple[float, str]]:
    "Figure and unit of each part."
    found = {}
    wave = make_clips(8, spec=SPEC, seed=0).waveform
    took = seconds(lambda: make_clips(64, spec=SPEC, seed=1), device=torch.device("cpu"), repeats=3)
    found["toy world"] = (64 / took, "clips/s")
    took = seconds(lambda: log_mel(torch.as_tensor(wave), SPEC), device=torch.device("cpu"))
    found["log-mel"] = (8 * SPEC.duration / took, "s of sound per s")
    model = CMMDUNet(UNetConfig.tiny()).to(device)
    found["tiny: parameters"] = (sum(p.numel() for p in model.parameters()) / 1e6, "million")
    x = tiny_inputs(UNetConfig.tiny(), device, batch=8)
    noise = {f"{name}_noise": torch.randn_like(x[name]) for name in ("video", "audio")}
    with torch.no_grad():
        took = seconds(lambda: model(*x.values()), device=device)
    found["tiny: forward, batch 8"] = (1000 * took, "ms")

    def step() -> None:
        model.zero_grad(set_to_none=True)
        joint_loss(model, x["video"], audio=x["audio"], t=x["t"], **noise).total.backward()

    found["tiny: forward and backward, batch 8"] = (1000 * seconds(step, device=device), "ms")
    for weight, name in ((0.0, "replacement"), (1.0, "guided")):
        request = {"guidance_weight": weight, "num_sample_steps": 4, "generator": make_generator(0)}
        took = seconds(
            lambda: generate(model, video=x["video"][:1], **request), device=device, repeats=3
        )
        found[f"tiny: one sampling step, {name}"] = (1000 * took / 4, "ms")
    return found


def paper_size(size: int) -> dict[str, tuple[float, str]]:
    "Parameters, and arithmetic of a forward pass, counted without computing."
    with torch.device("meta"):
        model = CMMDUNet(UNetConfig.paper())
        inputs = torch.empty(1, 18, 4, size, size), torch.empty(1, 80, 112)
        t = torch.zeros(1, dtype=torch.long)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(*inputs, t)
    return {
        "paper: parameters": (sum(p.numel() for p in model.parameters()) / 1e6, "million"),
        f"paper {size}x{size}: operations of a forward": (
            counter.get_total_flops() / 1e12,
            "TFLOP",
        ),
    }


def ceilings(repeats: int = 3) -> dict[str, float]:
    "Best GFLOP/s of the network's own kind of convolution, channels last, and of a large product."
    best = {}
    for c, size in ((128, 64), (256, 32), (384, 16)):
        x = torch.randn(18, c, size, size).contiguous(memory_format=torch.channels_last)
        conv = nn.Conv2d(c, c, 3, padding=1).to(memory_format=torch.channels_last)
        times = take_turns({"conv": lambda conv=conv, x=x: conv(x)}, repeats)["conv"]
        best[f"conv {c} -> {c} at {size}x{size}"] = 2e-9 * 9 * c * c * x[:, 0].numel() / min(times)
    a, b = torch.randn(2, 2048, 2048)
    best["matmul 2048"] = 2e-9 * 2048**3 / min(take_turns({"mm": lambda: a @ b}, repeats)["mm"])
    return best


def awake_paper() -> CMMDUNet:
    "The paper's network with no layer at zero: every path is open."
    torch.manual_seed(0)
    model = CMMDUNet(UNetConfig.paper()).eval().requires_grad_(False)
    for p in model.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.02)
    return model


def paper_inputs(size: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple:
    "One clip of noise: latents 18x4xSxS, mel 80x112, n."
    g = make_generator(0)
    video = torch.randn(1, 18, 4, size, size, generator=g)
    audio = torch.randn(1, 80, 112, generator=g)
    return video.to(device, dtype), audio.to(device, dtype), torch.tensor([500], device=device)


def sound_gradient(model: CMMDUNet, video, audio, t) -> torch.Tensor:
    "What guidance needs: the gradient of the video's estimate with respect to the sound."
    with torch.enable_grad():
        audio = audio.detach().requires_grad_()
        return torch.autograd.grad(model(video, audio, t)[0].square().sum(), audio)[0]


@torch.no_grad()
def bench_paper(size: int, rounds: int) -> dict[str, tuple[float, str]]:
    "The paper's network on the CPU: against the machine's ceilings and against a naive build."
    found, best, at = {}, ceilings(), f"paper {size}x{size}"
    ceiling = max(v for k, v in best.items() if k.startswith("conv"))
    for name, value in best.items():
        found[f"ceiling: {name}"] = (value, "GFLOP/s")
    model, x = awake_paper(), paper_inputs(size)
    naive = naive_build(model)
    for ours, theirs in zip(model(*x), naive(*x)):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * ours.abs().max().item())
    runs = {
        "ours": lambda: model(*x),
        "naive": lambda: naive(*x),
        "guidance": lambda: sound_gradient(model, *x),
    }
    times = take_turns(runs, rounds)
    rate = 1000 * paper_size(size)[f"{at}: operations of a forward"][0]
    rate = [rate / t for t in times["ours"]]
    found[f"{at}: forward"] = (statistics.median(times["ours"]), "s")
    found[f"{at}: share of the conv ceiling"] = (100 * statistics.median(rate) / ceiling, "%")
    share = 100 * statistics.median(rate) / best["matmul 2048"]
    found[f"{at}: share of the matmul ceiling"] = (share, "%")
    found[f"{at}: our build over the naive one"] = (ratio(times, "naive", "ours"), "x")
    guided = ratio(times, "guidance", "ours")
    found[f"{at}: forward + backward to the sound"] = (guided, "x a forward")
    return found


@torch.no_grad()
def bench_small_latents(rounds: int) -> dict[str, tuple[float, str]]:
    "At 16x16: weights kept channels last, and bf16, each against plain fp32."
    model, x = awake_paper(), paper_inputs(16)
    ready = awake_paper().to(memory_format=torch.channels_last)
    half, half_x = awake_paper().bfloat16(), (*(v.bfloat16() for v in x[:2]), x[2])
    runs = {"plain": lambda: model(*x), "ready": lambda: ready(*x)}
    times = take_turns(runs, rounds)
    kept, units = ratio(times, "plain", "ready"), torch.backends.cpu.get_cpu_capability()
    times = take_turns({"plain": runs["plain"], "half": lambda: half(*half_x)}, 1)
    return {
        "paper 16x16: weights kept channels last": (kept, "x"),
        "paper 16x16: bf16 over fp32": (ratio(times, "plain", "half"), f"x ({units})"),
    }


def verdict(name: str, value: float) -> str:
    "What was asked of a figure, and whether it is met."
    if name not in TARGETS:
        return ""
    at_most, goal = TARGETS[name]
    met = value <= goal if at_most else value >= goal
    return f"{'at most' if at_most else 'at least'} {goal:g}: {'met' if met else 'NOT met'}"


def add_history(figures: dict, about: dict, path: Path = HISTORY) -> None:
    "A line per figure that has a target, at the end of README.md's table of speed."
    lines, command = path.read_text().splitlines(), "speed.py " + shlex.join(sys.argv[1:])
    machine = f"{about['machine']}, torch {about['torch']}"
    rows = [
        f"| {about['date']} | {machine} | `{command.strip()}` | {name} | {value:.3g} {unit} |"
        for name, (value, unit) in figures.items()
        if name in TARGETS or name.startswith("CUDA")
    ]
    end = lines.index("<!-- end of the history -->")
    path.write_text("\n".join(lines[:end] + rows + lines[end:]) + "\n")


def main() -> None:
    "Measure, print, write."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--device", default="auto", help="of the parts; the paper's network is both"
    )
    parser.add_argument("--size", type=int, default=64, choices=(16, 32, 64), help="of the latents")
    parser.add_argument("--rounds", type=int, default=3, help="in which both sides take turns")
    parser.add_argument("--out", type=Path, default=Path("runs/bench.json"))
    parser.add_argument("--history", action="store_true", help="append to benchmarks/README.md")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    about = about_machine() | {"device": str(pick_device(asked.device)), "size": asked.size}
    about["vector units"] = torch.backends.cpu.get_cpu_capability()
    parts = [
        lambda: bench_parts(pick_device(asked.device)),
        lambda: paper_size(asked.size),
        lambda: bench_paper(asked.size, asked.rounds),
        lambda: bench_small_latents(asked.rounds),
        lambda: bench_gpu(awake_paper, paper_inputs),
    ]
    figures = {}
    for part in parts:
        for name, (value, unit) in part().items():
            figures[name] = (value, unit)
            print(f"{name:<46}{value:>10.4g} {unit:<20}{verdict(name, value)}".rstrip(), flush=True)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps({"about": about, "figures": figures}, indent=1) + "\n")
    print(f"written to {asked.out}")
    if asked.history:
        add_history(figures, about)


if __name__ == "__main__":
    main()
