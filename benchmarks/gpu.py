"""The GPU's part of `speed.py`: an evaluation and a guided sampling step, eager and recorded.

Milliseconds of one evaluation of the paper's network at batch 1 (forward, and forward + backward
with respect to the sound) and of a guided step, eager and as a CUDA graph, at 16x16 and 64x64, in
five ways: as the pipeline does it (float32; bf16 where that was asked for), as training does it
(float32 weights under autocast), and tuned (weights kept channels last, cudnn.benchmark) in
both precisions; TF32 as torch sets it. The streams are always float32. Each way is a process of its
own, so that what fails or takes too long there (a broken capture spoils its process) leaves the
others alone. `compiled` is a part for itself: it needs a C compiler, and minutes. Written from
PyTorch's documentation (torch.cuda.graph); no GPU was at hand for this project so far, so only the
logic was tried, with graphs that are none (tests/test_benchmarks.py).
"""

import argparse
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator

import torch
from common import Row, guarded
from network import awake_paper, paper_inputs, paper_operations, sound_gradient
from torch import Tensor, nn

from cmmd.core import make_generator
from cmmd.guidance import guided_step, sampling_steps, step_amplitudes

WEIGHT, STEPS = 8.0, 50
SIZES = (16, 64)  # of the latents
BF16 = torch.bfloat16
WAYS = {  # name -> type of the weights, under autocast to bf16, tuned
    "bf16-tuned": (BF16, False, True),
    "float32": (torch.float32, False, False),  # the pipeline's own
    "autocast": (torch.float32, True, False),  # training's own
    "bf16": (BF16, False, False),  # the pipeline with dtype=torch.bfloat16
    "float32-tuned": (torch.float32, False, True),
}
COMPILED_WAYS = ("bf16-tuned", "float32-tuned")
MODES = ("default", "max-autotune-no-cudagraphs")  # the others record graphs of their own


class AsCalled(nn.Module):
    "The network as one way calls it: float32 streams in, float32 velocities out."

    def __init__(self, net: nn.Module, way: str, device: str = "cuda"):
        super().__init__()
        self.dtype, self.autocast, tuned = WAYS[way]
        layout = {"memory_format": torch.channels_last} if tuned else {}
        self.config, self.net = net.config, nn.Module.to(net, device, self.dtype, **layout)

    def forward(self, video: Tensor, audio: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        x = video.to(self.dtype), audio.to(self.dtype), t
        # entered in here, and without its cache, so that a graph records every cast of a weight
        half = {"dtype": BF16, "enabled": self.autocast, "cache_enabled": False}
        with torch.autocast(video.device.type, **half):
            made = self.net(*x)
        return made[0].to(video.dtype), made[1].to(audio.dtype)


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
    here, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(here)
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    here.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(here), torch.cuda.graph(graph):  # `here` again also after a failure
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

    def record(self, recorder: Callable) -> "RecordedStep":
        "Record the step; from now on it is replayed."
        self.graph = recorder(self.step)
        return self

    def fill(self, z: Tensor, t: int, levels: Tensor) -> None:
        "The inputs of the next step."
        self.z.copy_(z)
        self.t.fill_(t)
        self.levels.copy_(levels)

    def __call__(self, z: Tensor, t: int, levels: Tensor) -> Tensor:
        "z after the step at n = t; valid until the next call."
        self.fill(z, t, levels)
        self.graph.replay()
        return self.graph.output


def recorded_step(model: Callable, x: tuple) -> RecordedStep:
    "A step that makes the sound, not yet recorded; its noise comes from the CPU."
    noise = torch.randn(x[0].shape, generator=make_generator(1)).to(x[0])
    return RecordedStep(model, x[1], condition=x[0], noise=noise)


def check_recorded(model: Callable, x: tuple, recorder: Callable) -> float:
    """The largest relative error of a replay whose inputs are not those of the recording.

    The step is recorded at n = 500. Then z, n and the levels change, each alone and together, and a
    replay has to be far nearer to an eager step than the answer at the first inputs is. These have
    the levels of the middle step: at the ends hardly anything of the network reaches the answer.
    """
    step = recorded_step(model, x)
    steps = sampling_steps(model, STEPS)
    levels = step_amplitudes(steps, x[1])
    z, middle, worst = x[1], levels[STEPS // 2], 0.0
    step.fill(z, 500, middle)
    first = step.step().clone()
    step.record(recorder)
    cases = {
        "z": (z.flip(-1), 500, middle),
        "n": (z, steps[-1][0], middle),
        "levels": (z, 500, levels[-5]),
        "n and levels": (z, steps[9][0], levels[9]),
        "z, n and levels": (z.flip(-1), steps[40][0], levels[40]),
    }
    for what, given in cases.items():
        again = step(*given).clone()
        eager = step.step()
        moved, apart = ((eager - other).norm().item() for other in (first, again))
        if not apart < 0.2 * moved:
            raise AssertionError(
                f"with another {what} the replay is {apart:.3g} from an eager step, which itself "
                f"moved by {moved:.3g}"
            )
        worst = max(worst, apart / eager.norm().item())
    return worst


def gpu_ceilings(dtype: torch.dtype) -> dict[str, float]:
    "TFLOP/s of a large product and of the network's kind of convolution."
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    a, b = (torch.randn(8192, 8192, device="cuda").to(dtype) for _ in range(2))
    x = torch.randn(18, 256, 64, 64, device="cuda").to(dtype, memory_format=torch.channels_last)
    conv = nn.Conv2d(256, 256, 3, padding=1).requires_grad_(False)
    conv = conv.to("cuda", dtype, memory_format=torch.channels_last)
    flop = 2 * 9 * 256 * 256 * x[:, 0].numel()
    best = {
        "matmul": 2e-9 * 8192**3 / milliseconds(lambda: a @ b),
        "conv": 1e-9 * flop / milliseconds(lambda: conv(x)),
    }
    torch.backends.cudnn.benchmark = before
    return best


def evaluations(model: Callable, x: tuple) -> dict[str, Callable[[], Tensor]]:
    "What is timed beside the guided step."
    return {
        "forward": lambda: model(*x)[0],
        "forward + backward to the sound": lambda: sound_gradient(model, *x),
    }


def eager_rows(model: Callable, x: tuple, name: str, *, times: dict) -> Iterator[Row]:
    "Milliseconds of everything, called as it is; they are left in `times`, too."
    runs = evaluations(model, x) | {"guided step": recorded_step(model, x).step}
    for what, run in runs.items():
        times[name, what] = milliseconds(run)
        yield f"{name}: {what}, eager", times[name, what], "ms"


def captured_rows(
    model: Callable, x: tuple, name: str, *, times: dict, best: dict
) -> Iterator[Row]:
    "Milliseconds of everything as a CUDA graph, and what that is beside eager and the ceilings."
    step = recorded_step(model, x).record(record)
    levels = step.levels.clone()
    runs = {"guided step": lambda: step(x[1], 500, levels)}
    for what, run in evaluations(model, x).items():
        runs[what] = record(run).replay
    for what, run in runs.items():
        took = milliseconds(run)
        yield f"{name}: {what}, captured", took, "ms"
        if (name, what) in times:
            yield f"{name}: {what}, captured over eager", times[name, what] / took, "x"
        if what == "forward":
            rate = 1e-9 * paper_operations(x[0].shape[-1])[1] / took
            for kind, peak in best.items():
                yield f"{name}: share of the {kind} ceiling", 100 * rate / peak, "%"


def check_row(model: Callable, x: tuple, name: str) -> Iterator[Row]:
    "The error of a replayed step, or why it does not follow its inputs."
    yield f"{name}: error of a replayed step", 100 * check_recorded(model, x, record), "%"


def way_rows(way: str, sizes: Iterable[int] = SIZES, device: str = "cuda") -> Iterator[Row]:
    "One way: everything eager first, since a capture that fails may spoil what comes after it."
    best, times, name = {}, {}, f"CUDA {way}"

    def ceilings() -> Iterator[Row]:
        best.update(gpu_ceilings(BF16 if WAYS[way][1] else WAYS[way][0]))
        for kind, value in best.items():
            yield f"{name}: {kind} ceiling", value, "TFLOP/s"

    yield from guarded(f"{name}: ceilings", ceilings())
    model = AsCalled(awake_paper(), way, device)
    inputs = {f"{name} {size}x{size}": paper_inputs(size, device) for size in sizes}
    for at, x in inputs.items():
        yield from guarded(f"{at}: eager", eager_rows(model, x, at, times=times))
    for at, x in inputs.items():
        yield from guarded(f"{at}: error of a replayed step", check_row(model, x, at))
        captured = captured_rows(model, x, at, times=times, best=best)
        yield from guarded(f"{at}: captured", captured)


def compiled_rows(way: str, mode: str, size: int, device: str = "cuda") -> Iterator[Row]:
    "A forward under torch.compile, recorded by us: its time, and how long compiling took."
    model, x = AsCalled(awake_paper(), way, device), paper_inputs(size, device)
    plain = model(*x)[0]
    began, name = time.perf_counter(), f"CUDA {way} {size}x{size}: forward, compiled ({mode})"
    model.net = torch.compile(model.net, fullgraph=True, dynamic=False, mode=mode)
    made = model(*x)[0]
    apart = ((made - plain).norm() / plain.norm()).item()  # .item() waits for the GPU
    yield f"{name}, compiling", time.perf_counter() - began, "s"
    if not apart < 0.05:
        raise AssertionError(f"the compiled network's answer is {100 * apart:.3g} % off")
    graph = record(lambda: model(*x)[0])
    yield f"{name} and captured", milliseconds(graph.replay), "ms"


def from_process(command: list[str], *, name: str, limit: float) -> Iterator[Row]:
    "The rows that a process prints, as they come, and why it ended where it did not end well."
    pipe = {"stdout": subprocess.PIPE, "text": True, "errors": "replace"}
    process = subprocess.Popen(command, **pipe, process_group=0)  # to end it with its compilers
    late = threading.Event()

    def stop() -> None:
        if process.poll() is None:
            late.set()
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    timer = threading.Timer(limit, stop)
    timer.start()
    try:
        for line in process.stdout:
            if line.startswith('["CUDA'):
                yield tuple(json.loads(line))
            else:
                print(line, end="", file=sys.stderr, flush=True)
        code = process.wait()
    finally:
        timer.cancel()
        stop()
        process.wait()
    if late.is_set() or code:
        yield name, None, f"longer than {limit:g} s" if late.is_set() else f"ended with {code}"


def bench_gpu(
    ways: Iterable[str], *, modes: Iterable[str] = (), limit: float = 240
) -> Iterator[Row]:
    "All rows of these ways, or compiled where there are modes; none where there is no CUDA."
    if not torch.cuda.is_available():
        print("CUDA: no GPU here, nothing measured")
        return
    jobs = [["--way", way] for way in ways]
    if modes:
        some = [way for way in COMPILED_WAYS if way in ways]
        jobs = [
            ["--way", way, "--mode", mode, "--size", str(size)]
            for mode, way, size in itertools.product(modes, some, SIZES)
        ]
    for job in jobs:
        name = f"CUDA {' '.join(job[1::2])}: process"
        yield from from_process([sys.executable, __file__, *job], name=name, limit=limit)


def main() -> None:
    "The rows of one way, or of one compiled network, as lines of JSON."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--way", choices=tuple(WAYS), required=True)
    parser.add_argument("--mode", choices=MODES, help="compiled, at one size")
    parser.add_argument("--size", type=int, choices=SIZES, default=16, help="with --mode")
    asked = parser.parse_args()
    torch.backends.cudnn.benchmark = WAYS[asked.way][2]
    rows = way_rows(asked.way)
    if asked.mode:
        name = f"CUDA {asked.way} {asked.size}x{asked.size}: forward, compiled ({asked.mode})"
        rows = guarded(name, compiled_rows(asked.way, asked.mode, asked.size))
    with torch.no_grad():
        for row in rows:
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
