"""The way of a practitioner, once through on one CPU core: films, shards, `small`, its figures.

    python benchmarks/small.py --films 300 --steps 1400 --out runs/small

Makes films of the toy world at the paper's size (128 pixels, 10 fps, 9.8 s), prepares them with
`cmmd prepare`, trains `UNetConfig.small()` (13M, 16 x 16 latents) with `cmmd train`, and measures
on the films of the test split: each modality's loss, how much it grows beside a shifted other,
and F1 of the onsets of generated sounds against the true ones (both detected: the files hold no
events). Every part that is already there is left as it is, so a stopped run goes on. The result
goes to benchmarks/small.json. An hour of one core; the record of a CPU, not a model to use.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from cmmd.core import ClipSpec
from cmmd.datasets import ShardDataset
from cmmd.joint import loss_gap
from cmmd.pipeline import load_model
from cmmd.toy import make_clips
from cmmd.train import read_metrics, validation_loss
from cmmd.unet import UNetConfig
from cmmd.viz import encode_mp4

FILM = ClipSpec(n_frames=98)  # five clips with four frames on either side
LEVELS = (300, 500, 700, 900)  # the n at which pairs are judged


def make_films(folder: Path, n: int, *, seed: int) -> None:
    "Films 0 .. n-1 of the toy world's stream."
    folder.mkdir(parents=True, exist_ok=True)
    for i in tqdm(range(n), unit="film"):
        path = folder / f"bounce-{i:04d}.mp4"
        if not path.exists():
            clip = make_clips(1, spec=FILM, seed=seed, kind="bounce", start=i)
            path.write_bytes(encode_mp4(clip.video[0], clip.waveform[0], spec=FILM, scale=1))


def cmmd(*words: object) -> None:
    "A command of the command line, in a process of its own."
    subprocess.run([sys.executable, "-m", "cmmd.cli", *map(str, words)], check=True)


def judge(model, data: ShardDataset) -> dict:
    "Losses and gaps on clips that were never trained on."
    video, audio = data.batch(range(len(data)))
    gaps = {n: loss_gap(model, video, audio=audio, t=n, batch_size=8) for n in LEVELS}
    return {"loss": validation_loss(model, data, batch_size=8), "gap": gaps}


def v2a_scores(report: Path) -> dict:
    "F1 of onsets, model beside chance and truth, out of an evaluator's report."
    metrics = json.loads(report.read_text())["results"]["v2a"]["metrics"]
    rows = {name: metrics[name] for name in ("f1_100", "f1_50")}
    return {
        name: {k: v for k, v in row.items() if not k.endswith("late")} for name, row in rows.items()
    }


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--films", type=int, default=300)
    p.add_argument("--steps", type=int, default=1400)
    p.add_argument("--seed", type=int, default=77, help="of the films")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--out", type=Path, default=Path("runs/small"))
    p.add_argument("--result", type=Path, default=Path("benchmarks/small.json"))
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    films, shards, run = (args.out / name for name in ("films", "data", "run"))
    make_films(films, args.films, seed=args.seed)
    common = ["--config", "small", "--threads", args.threads]
    if not (shards / "index.json").exists():
        cmmd("prepare", films, "--out", shards, "--vae", "tiny", "--allow-bad", *common)
    rate = ["--learning-rate", "5e-4", "--batch-size", "4", "--save-every", "100", "--resume"]
    if not (run / "model").exists():
        cmmd("train", "--data", shards, "--out", run, "--steps", args.steps, *rate, *common)
    asked = ["--n-clips", 40, "--directions", "v2a", "--v2a-weight", 0, "--threads", args.threads]
    if not (args.out / "evaluate" / "report.json").exists():
        cmmd("evaluate", "--model", run, "--data", shards, "--out", args.out / "evaluate", *asked)
    test, model = ShardDataset(shards, "test"), load_model(run)
    torch.manual_seed(0)
    fresh = type(model)(UNetConfig.from_dict(model.config.to_dict())).eval()
    metrics = read_metrics(run / "metrics.jsonl")
    machine = {"torch": torch.__version__, "system": platform.platform(), "threads": args.threads}
    told = {
        "date": time.strftime("%Y-%m-%d"),
        "command": ["python", "benchmarks/small.py", *sys.argv[1:]],
        "machine": machine,
        "parameters": sum(x.numel() for x in model.parameters()),
        "clips": {"train": len(ShardDataset(shards)), "test": len(test)},
        "training": json.loads((run / "model" / "training.json").read_text()),
        "test": {"trained": judge(model, test), "untrained": judge(fresh, test)},
        "v2a, unguided, 25 steps, 40 clips": v2a_scores(args.out / "evaluate" / "report.json"),
        "log": metrics[:: max(1, len(metrics) // 24)],
    }
    args.result.write_text(json.dumps(told, indent=1) + "\n")
    print(json.dumps(told["test"], indent=1))


if __name__ == "__main__":
    main()
