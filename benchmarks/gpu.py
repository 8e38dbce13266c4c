"""The GPU's part of `speed.py`: an evaluation and a guided sampling step, eager and recorded.

Milliseconds of one evaluation of the paper's network at batch 1 (forward, and forward + backward
with respect to the sound), eager, as a CUDA graph and under torch.compile, in fp32 (TF32 as torch
sets it) and bf16, at 16x16 and 64x64, each beside the chip's own ceilings for a large product and
for the network's kind of convolution. Written from PyTorch's documentation (torch.cuda.graph);
no GPU was at hand for this project so far, so nothing below has been run on one.
"""

import statistics
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cmmd.guidance import guided_step, sampling_steps, step_amplitudes

WEIGHT, STEPS = 8.0, 50


def milliseconds(run: Callable[[], object], repeats: int = 20) -> float:
    "Median time of one call on the GPU, between two events, after three to warm up."
    times = []
    for i in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        if i >= 3:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def record(run: Callable[[], Tensor]) -> torch.cuda.CUDAGraph:
    "A CUDA graph of one call: three on a side stream first, as the documentation asks."
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        graph.output = run()
    return graph


class RecordedStep:
    "A guided step whose inputs are fixed places in memory: fill them, replay, read the result."

    def __init__(self, model: Callable, z: Tensor, *, condition: Tensor, noise: Tensor):
        levels = step_amplitudes(sampling_steps(model, STEPS), z)
        self.z, self.t = z.clone(), torch.full((len(z),), 500, device=z.device)
        self.levels = levels[0].clone()
        given = {"condition": condition, "noise": noise, "guidance_weight": WEIGHT}
        self.step = lambda: guided_step(
            model, self.z, self.t, levels=self.levels, target=1, **given
        )

    def record(self) -> "RecordedStep":
        "Record the step; from now on it is replayed."
        self.graph = record(self.step)
        return self

    def __call__(self, z: Tensor, t: int, levels: Tensor) -> Tensor:
        "z after the step at n = t; valid until the next call."
        self.z.copy_(z)
        self.t.fill_(t)
        self.levels.copy_(levels)
        self.graph.replay()
        return self.graph.output


def gpu_ceilings(dtype: torch.dtype) -> dict[str, float]:
    "TFLOP/s of a large product and of the network's kind of convolution."
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=dtype)
    x = torch.randn(18, 256, 64, 64, device="cuda", dtype=dtype)
    conv = nn.Conv2d(256, 256, 3, padding=1).to("cuda", dtype, memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    flop = 2 * 9 * 256 * 256 * x[:, 0].numel()
    return {
        "matmul": 2e-9 * 8192**3 / milliseconds(lambda: a @ b),
        "conv": 1e-9 * flop / milliseconds(lambda: conv(x)),
    }


def sound_gradient(model: Callable, video: Tensor, audio: Tensor, t: Tensor) -> Tensor:
    "The gradient of the video's estimate with respect to the sound."
    with torch.enable_grad():
        audio = audio.detach().requires_grad_()
        return torch.autograd.grad(model(video, audio, t)[0].square().sum(), audio)[0]


def check_recorded(model: Callable, x: tuple) -> None:
    "A recorded step answers like an eager one, also for an n it was not recorded at."
    noise = torch.randn_like(x[0])
    step = RecordedStep(model, x[1], condition=x[0], noise=noise)
    steps = sampling_steps(model, STEPS)
    levels = step_amplitudes(steps, x[1])
    step.t.fill_(steps[9][0])
    step.levels.copy_(levels[9])
    eager = step.step().clone()
    again = step.record()(x[1], steps[9][0], levels[9])
    torch.testing.assert_close(again, eager, rtol=1e-2, atol=1e-2 * eager.abs().max().item())


def bench_size(model: nn.Module, x: tuple, *, name: str, best: dict) -> dict:
    "All figures of one size and precision."
    found, counter = {}, FlopCounterMode(display=False)
    with counter:
        model(*x)
    flop = counter.get_total_flops()
    step = RecordedStep(model, x[1], condition=x[0], noise=torch.randn_like(x[0]))
    runs = {
        "forward": lambda: model(*x)[0],
        "forward + backward to the sound": lambda: sound_gradient(model, *x),
        "guided step": step.step,
    }
    for what, run in runs.items():
        eager = milliseconds(run)
        graph = record(run)
        recorded = milliseconds(graph.replay)
        found[f"{name}: {what}, eager"] = (eager, "ms")
        found[f"{name}: {what}, captured"] = (recorded, "ms")
        found[f"{name}: {what}, captured over eager"] = (eager / recorded, "x")
        if what == "forward":
            for kind, peak in best.items():
                share = 100 * 1e-9 * flop / recorded / peak
                found[f"{name}: share of the {kind} ceiling"] = (share, "%")
    torch._dynamo.reset()
    options = {"fullgraph": True, "dynamic": False, "mode": "max-autotune-no-cudagraphs"}
    compiled = torch.compile(model, **options)
    graph = record(lambda: compiled(*x)[0])
    found[f"{name}: forward, compiled and captured"] = (milliseconds(graph.replay), "ms")
    return found


@torch.no_grad()
def bench_gpu(awake: Callable, inputs: Callable) -> dict[str, tuple[float, str]]:
    "The whole table, or nothing where there is no CUDA."
    if not torch.cuda.is_available():
        print("CUDA: no GPU here, nothing measured")
        return {}
    found = {}
    torch.backends.cudnn.benchmark = True
    for dtype, label in ((torch.bfloat16, ""), (torch.float32, " fp32")):
        best = gpu_ceilings(dtype)
        for kind, value in best.items():
            found[f"CUDA{label}: {kind} ceiling"] = (value, "TFLOP/s")
        model = nn.Module.to(awake(), "cuda", dtype, memory_format=torch.channels_last)
        for size in (16, 64):
            x = inputs(size, "cuda", dtype)
            check_recorded(model, x)
            found |= bench_size(model, x, name=f"CUDA{label} {size}x{size}", best=best)
    return found
