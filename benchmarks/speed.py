"""Speed of the parts on this machine (`make bench`): a table on the screen, JSON in a file.

python benchmarks/speed.py [--threads 1] [--device cpu] [--out runs/bench.json]
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from cmmd.core import ClipSpec, make_generator, pick_device
from cmmd.guidance import generate
from cmmd.joint import joint_loss
from cmmd.mel import log_mel
from cmmd.toy import make_clips
from cmmd.unet import CMMDUNet, UNetConfig

SPEC = ClipSpec.toy()


def seconds(run: Callable[[], object], *, device: torch.device, repeats: int = 5) -> float:
    "Median time of one call, after one to warm up."

    def once() -> float:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return statistics.median([once() for _ in range(repeats + 1)][1:])


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
    took = seconds(lambda: make_clips(64, spec=SPEC, seed=1), device=device, repeats=3)
    found["toy world"] = (64 / took, "clips/s")
    took = seconds(lambda: log_mel(torch.as_tensor(wave), SPEC), device=device)
    found["log-mel"] = (8 * SPEC.duration / took, "s of sound per s")
    model = CMMDUNet(UNetConfig.tiny()).to(device)
    found["tiny: parameters"] = (sum(p.numel() for p in model.parameters()) / 1e6, "million")
    x = tiny_inputs(UNetConfig.tiny(), device, batch=8)
    noise = {
        "video_noise": torch.randn_like(x["video"]),
        "audio_noise": torch.randn_like(x["audio"]),
    }
    with torch.no_grad():
        took = seconds(lambda: model(*x.values()), device=device)
    found["tiny: forward, batch 8"] = (1000 * took, "ms")

    def step() -> None:
        model.zero_grad(set_to_none=True)
        joint_loss(model, x["video"], audio=x["audio"], t=x["t"], **noise).total.backward()

    found["tiny: forward and backward, batch 8"] = (1000 * seconds(step, device=device), "ms")
    for weight, name in ((0.0, "replacement"), (1.0, "guided")):

        def sample(weight=weight):
            return generate(
                model,
                video=x["video"][:1],
                guidance_weight=weight,
                num_sample_steps=4,
                generator=make_generator(0),
            )

        took = seconds(sample, device=device, repeats=3) / 4
        found[f"tiny: one sampling step, {name}"] = (1000 * took, "ms")
    return found


def paper_size() -> dict[str, tuple[float, str]]:
    "Parameters, and arithmetic of a forward pass on 64 x 64 latents, counted without computing."
    with torch.device("meta"):
        model = CMMDUNet(UNetConfig.paper())
        inputs = (
            torch.empty(1, 18, 4, 64, 64),
            torch.empty(1, 80, 112),
            torch.zeros(1, dtype=torch.long),
        )
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(*inputs)
    return {
        "paper: parameters": (sum(p.numel() for p in model.parameters()) / 1e6, "million"),
        "paper: forward at 64 x 64": (counter.get_total_flops() / 1e12, "TFLOP"),
    }


def main() -> None:
    "Measure, print, write."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/bench.json"))
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    device = pick_device(asked.device)
    figures = {**bench_parts(device), **paper_size()}
    for name, (value, unit) in figures.items():
        print(f"{name:<42}{value:>10.4g} {unit}")
    machine = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "device": str(device),
        "threads": asked.threads,
    }
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps({"machine": machine, "figures": figures}, indent=1) + "\n")
    print(f"written to {asked.out}")


if __name__ == "__main__":
    main()
