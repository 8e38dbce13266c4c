"""Which audio_snr_scale lets the tiny model synchronise? Equal data, steps and seeds for all.

    python benchmarks/balance.py --steps 400 --seeds 0 1 2 --out benchmarks/labs/balance.json

About 2 minutes of one CPU core for each run (3 scales x 3 seeds); the file is written after every
run, and runs that are in it already are not repeated. nbs/65_balance.ipynb reads it.
"""

import argparse
import datetime
import json
import os
import platform
import time
from pathlib import Path

import torch

from cmmd.core import ClipSpec, make_generator
from cmmd.datasets import toy_dataset
from cmmd.guidance import generate
from cmmd.joint import loss_gap
from cmmd.latents import decode_video, load_vae
from cmmd.mel import denormalise_mel
from cmmd.sync import chance_f1, detect_impacts, detect_onsets, event_scores
from cmmd.toy import make_clips
from cmmd.train import TrainConfig, train
from cmmd.unet import CMMDUNet, UNetConfig

TIMES = (300, 400, 500, 600, 700, 800, 850, 900, 950)


def f1_scores(true, found) -> dict[str, float]:
    return {str(tol): event_scores(true, found, tolerance=tol).f1 for tol in (0.05, 0.1)}


def measure(model, test, clips, vae, seed: int) -> dict:
    "Loss gaps over n, and F1 of both directions by replacement (guidance weight 0, 25 steps)."
    spec, out = model.config.clip, {}
    gaps = [loss_gap(model, test.video, audio=test.audio, t=t) for t in TIMES]
    out["gap"] = {side: [round(g[side], 4) for g in gaps] for side in ("audio", "video")}
    heard = generate(
        model, video=test.video, num_sample_steps=25, generator=make_generator(seed, "v2a")
    ).audio
    onsets = [detect_onsets(denormalise_mel(a, test.mel_mean, test.mel_std), spec) for a in heard]
    seen = generate(
        model, audio=test.audio, num_sample_steps=25, generator=make_generator(seed, "a2v")
    ).video
    impacts = [detect_impacts(v, spec) for v in decode_video(vae, seen)]
    return out | {"v2a": f1_scores(clips.events, onsets), "a2v": f1_scores(clips.events, impacts)}


def one_run(scale: float, seed: int, steps: int, train_data, test, clips, vae) -> dict:
    torch.manual_seed(seed)
    model = CMMDUNet(
        UNetConfig.tiny(
            audio_snr_scale=scale,
            mel_mean=train_data.mel_mean,
            mel_std=train_data.mel_std,
            vae="tiny",
        )
    )
    began = time.process_time()
    result = train(model, train_data, config=TrainConfig.tiny(steps=steps, seed=seed))
    return {
        "scale": scale,
        "seed": seed,
        "steps": steps,
        "cpu_s": round(time.process_time() - began, 1),
        **measure(result.ema_model, test, clips, vae, seed),
    }


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--steps", type=int, default=400)
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--scales", type=float, nargs="+", default=[1.0, 1 / 10, 1 / 64])
    p.add_argument("--out", type=Path, default=Path("benchmarks/labs/balance.json"))
    args = p.parse_args()
    torch.set_num_threads(1)
    vae, spec = load_vae("tiny"), ClipSpec.toy()
    data = toy_dataset(512, vae, spec=spec, seed=1)
    test = toy_dataset(32, vae, spec=spec, seed=2, mel=(data.mel_mean, data.mel_std))
    clips = make_clips(32, spec=spec, seed=2)
    chance = {
        str(tol): chance_f1(clips.events, tolerance=tol, generator=make_generator(0))
        for tol in (0.05, 0.1)
    }
    about = {
        "date": str(datetime.date.today()),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, one thread",
        "torch": torch.__version__,
        "train_clips": 512,
        "test_clips": 32,
        "batch_size": 8,
        "times": TIMES,
        "chance": chance,
    }
    runs = json.loads(args.out.read_text())["runs"] if args.out.is_file() else []
    for seed in args.seeds:
        for scale in args.scales:
            if any(
                abs(r["scale"] - scale) < 1e-9 and r["seed"] == seed and r["steps"] == args.steps
                for r in runs
            ):
                continue
            runs.append(one_run(scale, seed, args.steps, data, test, clips, vae))
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps({"about": about, "runs": runs}, indent=1) + "\n")
            print(json.dumps({k: v for k, v in runs[-1].items() if k != "gap"}), flush=True)


if __name__ == "__main__":
    main()
