"""Easy fusion against its alternatives, from scratch: equal parameters, data, order and steps.

    python benchmarks/fusion.py cost       FLOPs, time and peak memory of a training step
    python benchmarks/fusion.py run        train and measure each fusion, seed by seed

`run` writes benchmarks/labs/fusion.json, `cost` writes fusion-cost.json beside it (lab 93). The
arms differ in `UNetConfig.fusion`, and in the width of the time embedding, which evens out the
number of parameters. `run` takes about 2 minutes of one CPU core for each arm and seed; the file is
written after every run, a run that is in it is not repeated, and one that was interrupted goes on
from its last checkpoint in runs/fusion. `cost` measures each arm in its own process: time as the
median CPU time of single steps, memory as the growth of the process's peak resident size
(ru_maxrss) over all that is there before a step.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from common import FRESH, PAPER, Results, TestSet, about_machine, f1_scores
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cmmd.blocks import time_features
from cmmd.datasets import ClipDataset, load_dataset, save_dataset, toy_dataset
from cmmd.fusion import FUSIONS, CrossAttentionFusion
from cmmd.joint import loss_gap
from cmmd.latents import load_vae
from cmmd.train import StepData, TrainConfig, joint_loss_fn, read_metrics, train
from cmmd.train import validation_loss
from cmmd.unet import CMMDUNet, UNetConfig

RUNS = Path("runs/fusion")
SCALE, BATCH = 1 / 64, 8


class PlacedCrossAttention(CrossAttentionFusion):
    "Cross-attention whose two inputs carry a code of their moment, on one clock."

    def other(self, video, audio, ratio):
        f, t = video.shape[1], audio.shape[-1]
        frames, columns = (torch.arange(n, device=video.device) + 0.5 for n in (f, t))
        of_frames = time_features(frames * (ratio or t / f), video.shape[2], max_period=100)
        of_columns = time_features(columns, audio.shape[1], max_period=100)
        video = video + 2 * of_frames[:, :, None, None]
        return super().other(video, audio + 2 * of_columns.T, ratio)


FUSIONS["cross_attention, placed"] = PlacedCrossAttention
TIME_DIMS = {  # arm -> UNetConfig.time_embed_dim that evens out the parameters
    "easy": 96,
    "cross_attention": 82,
    "window": 82,
    "none": 120,
    "cross_attention, placed": 82,
}


def network(arm: str, mel: tuple[float, float], seed: int = 0) -> CMMDUNet:
    "The tiny network with that fusion."
    torch.manual_seed(seed)
    return CMMDUNet(
        UNetConfig.tiny(
            fusion=arm,
            time_embed_dim=TIME_DIMS[arm],
            audio_snr_scale=SCALE,
            mel_mean=mel[0],
            mel_std=mel[1],
            vae="tiny",
        )
    )


def training_data(n: int) -> ClipDataset:
    "The clips of every arm, encoded once."
    path = RUNS / f"clips-{n}.safetensors"
    if not path.is_file():
        save_dataset(toy_dataset(n, load_vae("tiny"), seed=1), path)
    return load_dataset(path)


def step_cost(arm: str, data: ClipDataset) -> dict:
    "What one training step takes: parameters, FLOPs, CPU time, growth of the peak memory."
    model = network(arm, (data.mel_mean, data.mel_std)).train()
    batch = StepData(data, TrainConfig.tiny(batch_size=BATCH), num_train_steps=1000)[0][0]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    seconds, before = [], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def step():
        began = time.process_time()
        joint_loss_fn(model, batch).total.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.process_time() - began)

    for _ in range(6):
        step()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    counts = counter.get_flop_counts()
    met = (sum(ops.values()) for name, ops in counts.items() if name.endswith(".fusion"))
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "time_embed_dim": TIME_DIMS[arm],
        "gflop_step": round(counter.get_total_flops() / 1e9, 3),
        "gflop_fusions": round(sum(met) / 1e9, 3),
        "cpu_s_step": round(statistics.median(seconds[1:6]), 4),
        "peak_mb": round(grown / 1024, 1),
    }


def one_arm(arm: str, *, seed: int, steps: int, data: ClipDataset, test: TestSet) -> dict:
    "Train one arm from scratch and measure it: 25 sampling steps, replacement, two samplers."
    folder = RUNS / f"{arm.replace(' ', '-').replace(',', '')}-{steps}-seed{seed}"
    config = TrainConfig.tiny(steps=steps, batch_size=BATCH, seed=seed, save_every=50, log_every=50)
    model = network(arm, (data.mel_mean, data.mel_std), seed)
    before = read_metrics(folder / "metrics.jsonl") if folder.is_dir() else []
    done = min(max((m["step"] for m in before), default=0), steps - 1)
    began = time.process_time()
    result = train(model, data, config=config, out_dir=folder, resume=folder.is_dir())
    if result.step < steps:
        raise SystemExit(f"stopped at step {result.step}: the same command goes on from there")
    spent = (time.process_time() - began) * steps / (steps - done)  # also for a run's other lives
    run = {"arm": arm, "seed": seed, "steps": steps, "parameters": result.model.num_parameters()}
    run["cpu_s"] = round(spent, 1)
    names = ("step", "loss_video", "loss_audio")
    run["history"] = [{k: round(m[k], 4) for k in names if k in m} for m in result.history]
    model = result.ema_model
    run["loss"] = validation_loss(model, test.data)
    for t in (500, 700):
        gap = loss_gap(model, test.data.video, audio=test.data.audio, t=t)
        run[f"gap {t}"] = {k: round(v, 4) for k, v in gap.items()}
    for name, solver in (("paper", PAPER), ("fresh", FRESH)):
        run[f"v2a, {name}"] = f1_scores(test.events, test.sample(model, "v2a", solver=solver)[1])
    return run


def cost(args) -> None:
    "The table of costs, each arm in its own process."
    training_data(args.clips)  # encoded before, not in a process that is measured
    table, out = {}, args.out.with_name(f"{args.out.stem}-cost.json")
    for arm in args.arms or TIME_DIMS:
        command = [sys.executable, __file__, "step", "--arms", arm, "--clips", str(args.clips)]
        answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        table[arm] = json.loads(answer.splitlines()[-1])
        print(arm, table[arm], flush=True)
    about = about_machine() | {"batch_size": BATCH}
    out.write_text(json.dumps({"about": about, "arms": table}, indent=1) + "\n")


def run(args) -> None:
    "All arms, seed by seed; one seed is enough for the control."
    data = training_data(args.clips)
    first = network("easy", (data.mel_mean, data.mel_std))
    test = TestSet("bounce", args.test_clips, vae=load_vae("tiny"), model=first)
    about = about_machine() | {
        "train_clips": len(data),
        "batch_size": BATCH,
        "bounce": test.about(),
    }
    about |= {"steps": args.steps, "audio_snr_scale": SCALE, "sample_steps": 25}
    results = Results(args.out, about)
    for seed in args.seeds:
        for arm in args.arms or TIME_DIMS:
            if results.has(arm=arm, seed=seed, steps=args.steps) or (arm == "none" and seed):
                continue
            results.add(one_arm(arm, seed=seed, steps=args.steps, data=data, test=test))
            print({k: v for k, v in results.runs[-1].items() if k != "history"}, flush=True)


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("what", choices=("cost", "step", "run"), help="step: one arm's cost, printed")
    p.add_argument("--arms", nargs="*", choices=tuple(TIME_DIMS), help="only these arms")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--steps", type=int, default=450)
    p.add_argument("--clips", type=int, default=512, help="training clips")
    p.add_argument("--test-clips", type=int, default=32)
    p.add_argument("--out", type=Path, default=Path("benchmarks/labs/fusion.json"))
    args = p.parse_args()
    torch.set_num_threads(1)
    if args.what == "step":
        print(json.dumps(step_cost(args.arms[0], training_data(args.clips))))
    else:
        {"cost": cost, "run": run}[args.what](args)


if __name__ == "__main__":
    main()
