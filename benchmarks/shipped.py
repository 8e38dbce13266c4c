"""The figures promised of a small checkpoint, on unseen `bounce` clips, with 95% intervals.

    python benchmarks/shipped.py --model toy-bounce --out benchmarks/shipped.json

    python benchmarks/shipped.py --frames 36 --clips 32 --seeds 0 --v2a 0 --a2v 0.1 \\
        --out benchmarks/shipped-36-frames.json

Video to sound and sound to video with and without guidance, the loss gap at n = 700, chance and
ceiling; the second command at twice the training length. About 6 and 1 minutes of one CPU core.
"""

import argparse
import datetime
import json
import os
import platform
import time
from pathlib import Path

import torch
from common import TOLERANCES, score

from cmmd.core import make_generator
from cmmd.datasets import toy_dataset
from cmmd.guidance import DDIM, generate
from cmmd.joint import loss_gap
from cmmd.latents import decode_video, load_vae
from cmmd.mel import denormalise_mel
from cmmd.pipeline import load_model
from cmmd.sync import chance_f1, detect_impacts, detect_onsets
from cmmd.toy import make_clips


def generated_events(
    model, vae, data, *, side: str, seed: int, weight: float, steps: int, solver: DDIM
) -> list:
    "Events found in what was made: onsets in sound for `video`, impacts in video for `audio`."
    spec, found = model.config.clip, []
    for i in range(0, len(data), 16):
        given = {side: getattr(data, side)[i : i + 16]}
        made = generate(
            model,
            **given,
            guidance_weight=weight,
            num_sample_steps=steps,
            solver=solver,
            generator=make_generator(seed, side, i),
        )
        if side == "video":
            mels = denormalise_mel(made.audio, model.config.mel_mean, model.config.mel_std)
            found += [detect_onsets(mel, spec) for mel in mels]
        else:
            found += [detect_impacts(v, spec) for v in decode_video(vae, made.video)]
    return found


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", default="toy-bounce")
    p.add_argument("--clips", type=int, default=64)
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--steps", type=int, default=25)
    p.add_argument(
        "--v2a", type=float, nargs="*", default=[0.0, 2.0], help="guidance weights, video to sound"
    )
    p.add_argument(
        "--a2v",
        type=float,
        nargs="*",
        default=[0.0, 0.1, 0.2],
        help="guidance weights, sound to video",
    )
    p.add_argument("--noise", default="fresh", help="the solver's noise_direction")
    p.add_argument("--frames", type=int, default=18, help="length of the clips; 18 was trained")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--out", type=Path, default=None)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    model, vae = load_model(args.model), load_vae("tiny")
    mel, spec = (model.config.mel_mean, model.config.mel_std), model.config.clip
    report = {
        "date": str(datetime.date.today()),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {args.threads} thread(s)",
        "torch": torch.__version__,
        "model": args.model,
        "clips": args.clips,
        "frames": args.frames,
        "toy_seed": 2,
        "sample_seeds": args.seeds,
        "steps": args.steps,
        "noise_direction": args.noise,
    }
    long, began = spec.with_frames(args.frames), time.time()
    clips = make_clips(args.clips, spec=long, seed=2)
    data = toy_dataset(args.clips, vae, spec=long, seed=2, mel=mel)
    report["chance"] = {
        f"{1000 * t:.0f} ms": round(
            chance_f1(clips.events, tolerance=t, generator=make_generator(0)), 4
        )
        for t in TOLERANCES
    }
    report["ceiling, sound"] = score(
        clips.events, [detect_onsets(denormalise_mel(a, *mel), long) for a in data.audio]
    )
    report["ceiling, video through the VAE"] = score(
        clips.events, [detect_impacts(v, long) for v in decode_video(vae, data.video)]
    )
    report["loss gap at n = 700"] = loss_gap(model, data.video[:64], audio=data.audio[:64], t=700)
    jobs = [("v2a", "video", w) for w in args.v2a] + [("a2v", "audio", w) for w in args.a2v]
    for name, side, weight in jobs:
        found = [
            generated_events(
                model,
                vae,
                data,
                side=side,
                seed=s,
                weight=weight,
                steps=args.steps,
                solver=DDIM(noise_direction=args.noise),
            )
            for s in args.seeds
        ]
        report[f"{name}, guidance weight {weight:g}"] = score(
            clips.events * len(args.seeds), sum(found, [])
        )
        print(name, weight, json.dumps(report[f"{name}, guidance weight {weight:g}"]), flush=True)
    report["seconds"] = round(time.time() - began)
    print(json.dumps(report, indent=1))
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
