"""Speed of the parts on this machine (`make bench`): a table on the screen, JSON in a file.

    python benchmarks/speed.py [--only cpu gpu compiled] [--size 64] [--out runs/bench.json]

The paper's network is measured at batch 1 against ceilings and a naive build of the same run. On
the CPU a time is the process's own CPU time, since a neighbour's load stretches every other clock,
and a ratio is the median over rounds in which both sides take turns. 16 instead of 64 (latents of
16x16) is a quick look. Where there is CUDA, `gpu.py` adds its parts: `--only cpu gpu` leaves
torch.compile out, `--only gpu` is the GPU alone. The file is written again after each row; what
fails is a row with its reason, and the others go on. --history appends what has a target to
README.md, and --history-of does that for a file that was written before, or elsewhere.
"""

import argparse
import copy
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from common import Row, about_machine, guarded, write_json
from gpu import MODES, WAYS, bench_gpu
from naive import naive_build
from network import awake_paper, paper_inputs, paper_operations, sound_gradient
from torch import nn

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
    "CUDA bf16-tuned 16x16: guided step, captured over eager": (False, 3.0),
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


def bench_parts(device: torch.device) -> Iterator[Row]:
    "Figure and unit of each part."
    wave = make_clips(8, spec=SPEC, seed=0).waveform
    took = seconds(lambda: make_clips(64, spec=SPEC, seed=1), device=torch.device("cpu"), repeats=3)
    yield "toy world", 64 / took, "clips/s"
    took = seconds(lambda: log_mel(torch.as_tensor(wave), SPEC), device=torch.device("cpu"))
    yield "log-mel", 8 * SPEC.duration / took, "s of sound per s"
    model = CMMDUNet(UNetConfig.tiny()).to(device)
    yield "tiny: parameters", sum(p.numel() for p in model.parameters()) / 1e6, "million"
    x = tiny_inputs(UNetConfig.tiny(), device, batch=8)
    noise = {f"{name}_noise": torch.randn_like(x[name]) for name in ("video", "audio")}

    @torch.no_grad()
    def forward() -> None:
        model(*x.values())

    yield "tiny: forward, batch 8", 1000 * seconds(forward, device=device), "ms"

    def step() -> None:
        model.zero_grad(set_to_none=True)
        joint_loss(model, x["video"], audio=x["audio"], t=x["t"], **noise).total.backward()

    yield "tiny: forward and backward, batch 8", 1000 * seconds(step, device=device), "ms"
    for weight, name in ((0.0, "replacement"), (1.0, "guided")):
        request = {"guidance_weight": weight, "num_sample_steps": 4, "generator": make_generator(0)}
        took = seconds(
            lambda: generate(model, video=x["video"][:1], **request), device=device, repeats=3
        )
        yield f"tiny: one sampling step, {name}", 1000 * took / 4, "ms"


def paper_size(size: int) -> Iterator[Row]:
    "Parameters, and arithmetic of a forward pass."
    parameters, operations = paper_operations(size)
    yield "paper: parameters", parameters / 1e6, "million"
    yield f"paper {size}x{size}: operations of a forward", operations / 1e12, "TFLOP"


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


@torch.no_grad()
def bench_paper(size: int, rounds: int) -> Iterator[Row]:
    "The paper's network on the CPU: against the machine's ceilings and against a naive build."
    best, at = ceilings(), f"paper {size}x{size}"
    ceiling = max(v for k, v in best.items() if k.startswith("conv"))
    for name, value in best.items():
        yield f"ceiling: {name}", value, "GFLOP/s"
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
    operations = paper_operations(size)[1]
    rate = statistics.median(1e-9 * operations / t for t in times["ours"])
    yield f"{at}: forward", statistics.median(times["ours"]), "s"
    yield f"{at}: share of the conv ceiling", 100 * rate / ceiling, "%"
    yield f"{at}: share of the matmul ceiling", 100 * rate / best["matmul 2048"], "%"
    yield f"{at}: our build over the naive one", ratio(times, "naive", "ours"), "x"
    yield f"{at}: forward + backward to the sound", ratio(times, "guidance", "ours"), "x a forward"


def bf16_units() -> str:
    "The vector units, and whether torch's fast bf16 (oneDNN's, from AVX512 on) runs on them."
    fast = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return f"{torch.backends.cpu.get_cpu_capability()}: oneDNN {'does' if fast else 'refuses'} bf16"


@torch.no_grad()
def bench_small_latents(rounds: int) -> Iterator[Row]:
    "At 16x16: weights kept channels last, and bf16, each against plain fp32."
    model, x = awake_paper(), paper_inputs(16)
    ready = awake_paper().to(memory_format=torch.channels_last)
    half, half_x = awake_paper().bfloat16(), (*(v.bfloat16() for v in x[:2]), x[2])
    runs = {"plain": lambda: model(*x), "ready": lambda: ready(*x)}
    yield (
        "paper 16x16: weights kept channels last",
        ratio(take_turns(runs, rounds), "plain", "ready"),
        "x",
    )
    times = take_turns({"plain": runs["plain"], "half": lambda: half(*half_x)}, 1)
    yield "paper 16x16: bf16 over fp32", ratio(times, "plain", "half"), f"x ({bf16_units()})"


@torch.no_grad()
def bench_bf16(rounds: int = 2) -> Iterator[Row]:
    "Where bf16 gains or loses its time: single layers over fp32; the network is channels last."
    conv, linear = nn.Conv2d(128, 128, 3, padding=1), nn.Linear(512, 512)
    image, rows = torch.randn(1, 128, 32, 32), torch.randn(4096, 512)
    last = {"memory_format": torch.channels_last}
    layers = {
        "conv 128 -> 128 at 32x32": (copy.deepcopy(conv).to(**last), image.to(**last)),
        "conv 128 -> 128 at 32x32, NCHW": (conv, image),
        "linear 512 -> 512, 4096 rows": (linear, rows),
    }
    for name, (layer, x) in layers.items():
        half, half_x = copy.deepcopy(layer).bfloat16(), x.bfloat16()
        runs = {
            "plain": lambda layer=layer, x=x: layer(x),
            "half": lambda half=half, half_x=half_x: half(half_x),
        }
        yield f"{name}: bf16 over fp32", ratio(take_turns(runs, rounds), "plain", "half"), "x"


def verdict(name: str, value: float) -> str:
    "What was asked of a figure, and whether it is met."
    if name not in TARGETS:
        return ""
    at_most, goal = TARGETS[name]
    met = value <= goal if at_most else value >= goal
    return f"{'at most' if at_most else 'at least'} {goal:g}: {'met' if met else 'NOT met'}"


# of the GPU's many rows the history keeps these
KEPT = ("guided step, captured", "share of the conv ceiling", "and captured")


def add_history(report: dict, path: Path = HISTORY) -> None:
    "A line per figure that has a target, at the end of README.md's table of speed."
    lines, about = path.read_text().splitlines(), report["about"]
    machine = ", ".join([about["machine"], *filter(None, [about.get("gpu")])])
    machine += f", torch {about['torch']}"
    rows = [
        f"| {about['date']} | {machine} | `{about['command']}` | {name} | {value:.3g} {unit} |"
        for name, (value, unit) in report["figures"].items()
        if name in TARGETS or name.startswith("CUDA") and any(k in name for k in KEPT)
    ]
    end = lines.index("<!-- end of the history -->")
    path.write_text("\n".join(lines[:end] + rows + lines[end:]) + "\n")


def all_rows(asked: argparse.Namespace) -> Iterator[Row]:
    "Everything that was asked for; what fails does not hinder the rest."
    device = pick_device(asked.device)
    parts = {
        "cpu": [
            ("parts", lambda: bench_parts(device)),
            ("operations", lambda: paper_size(asked.size)),
            ("paper", lambda: bench_paper(asked.size, asked.rounds)),
            ("paper 16x16", lambda: bench_small_latents(asked.rounds)),
            ("bf16", bench_bf16),
        ],
        "gpu": [("CUDA", lambda: bench_gpu(asked.ways, limit=asked.limit))],
        "compiled": [
            ("CUDA, compiled", lambda: bench_gpu(asked.ways, modes=asked.modes, limit=asked.limit))
        ],
    }
    for part in parts:
        for name, rows in parts[part] if part in asked.only else ():
            yield from guarded(name, rows())


def measure(rows: Iterator[Row], report: dict, out: Path) -> None:
    "Print each row and write the file again."
    figures, failed = report.setdefault("figures", {}), report.setdefault("failed", {})
    for name, value, unit in rows:
        if value is None:
            failed[name] = unit
            print(f"{name:<46}     FAILED {unit}", flush=True)
        else:
            figures[name] = (value, unit)
            print(
                f"{name:<46}{value:>10.4g} {unit:<20} {verdict(name, value)}".rstrip(), flush=True
            )
        write_json(out, report)


def arguments() -> argparse.ArgumentParser:
    "What can be asked for."
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ("cpu", "gpu", "compiled")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--ways", nargs="+", choices=tuple(WAYS), default=tuple(WAYS), help="CUDA")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES, help="of `compiled`")
    parser.add_argument("--limit", type=float, default=240, help="seconds of each CUDA process")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="auto", help="of the toy world's parts")
    parser.add_argument("--size", type=int, default=64, choices=(16, 32, 64), help="of the latents")
    parser.add_argument("--rounds", type=int, default=3, help="in which both sides take turns")
    parser.add_argument("--out", type=Path, default=Path("runs/bench.json"))
    parser.add_argument("--history", action="store_true", help="append to benchmarks/README.md")
    parser.add_argument("--history-of", type=Path, help="only that, of a file written before")
    return parser


def main() -> None:
    "Measure, print, write."
    asked = arguments().parse_args()
    if asked.history_of:
        add_history(json.loads(asked.history_of.read_text()))
        return
    torch.set_num_threads(asked.threads)
    about = about_machine() | {"device": str(pick_device(asked.device)), "size": asked.size}
    about["vector units"] = torch.backends.cpu.get_cpu_capability()
    about["command"] = f"speed.py {shlex.join(sys.argv[1:])}".strip()
    if "gpu" in about:
        print(about["gpu"])
    report = {"about": about}
    measure(all_rows(asked), report, asked.out)
    print(f"written to {asked.out}")
    if asked.history:
        add_history(report)
    if not report["figures"]:
        sys.exit("nothing was measured")


if __name__ == "__main__":
    main()
