"""Labs 90 to 92: what the contrastive term does to a trained model, everything else equal.

    python benchmarks/contrast.py run --lab eta                  lab 90, world `bounce`
    python benchmarks/contrast.py run --lab negatives            lab 91
    python benchmarks/contrast.py run --lab targets              lab 92
    python benchmarks/contrast.py start                          runs/contrast/dance-start
    python benchmarks/contrast.py run --lab eta --world dance    lab 90, world `dance`

All write benchmarks/labs/contrast.json. The arms of `bounce` start from the shipped `toy-bounce`;
those of `dance` from what `start` makes of it with 3,000 plain steps on `dance` (13 minutes of a
CPU core). From there every arm goes on with equal data, order, noise and learning rate; arms
differ in the term that is subtracted. 2 to 4 minutes for each arm and seed. A run that is in the
file is not repeated.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch
from common import (
    FRESH,
    PAPER,
    Results,
    TestSet,
    about_machine,
    frechet_distance,
    latent_features,
    mel_features,
    scores,
)

from cmmd.contrastive import ContrastiveConfig, ContrastiveLossFn
from cmmd.datasets import load_dataset, save_dataset, toy_dataset
from cmmd.joint import loss_gap
from cmmd.latents import load_vae
from cmmd.pipeline import load_model, load_start
from cmmd.train import TrainConfig, TrainError, read_metrics, train, validation_loss
from cmmd.unet import CMMDUNet

RUNS = Path("runs/contrast")
STEPS, BATCH = 500, 4
TUNE = {"batch_size": BATCH, "learning_rate": 3e-4, "schedule": "cosine", "warmup_steps": 20}
TUNE |= {"ema_decay": 0.99}
ETAS = (5e-5, 1e-3, 3e-3, 1e-2, 3e-2)


def arms(lab: str, compute_ratio: float) -> dict[str, tuple[ContrastiveConfig, int]]:
    "Name -> contrastive term and steps."
    plain = ContrastiveConfig(weight=0.0)
    if lab == "eta":
        some = {f"eta {eta:g}": (ContrastiveConfig(weight=eta), STEPS) for eta in reversed(ETAS)}
        same = {"plain, equal compute": (plain, round(STEPS * compute_ratio))}
        return {"plain": (plain, STEPS), **some, **same}
    if lab == "negatives":
        kinds = ("split_swap", "swap", "mixture")
        return {f"eta 0.01, {k}": (ContrastiveConfig(negatives=k), STEPS) for k in kinds}
    return {
        "eta 0.01, positive": (ContrastiveConfig(target="positive"), STEPS),
        "eta 0.01, other": (ContrastiveConfig(target="other"), STEPS),
        "eta 0.01, bound 1": (ContrastiveConfig(bound=1.0), STEPS),
        "eta 0.03, bound 1": (ContrastiveConfig(weight=0.03, bound=1.0), STEPS),
    }


def start_model(world: str):
    "What the arms of a world start from."
    return load_start("toy-bounce" if world == "bounce" else RUNS / "dance-start" / "model")


def training_data(world: str, n: int, vae, mel):
    "The clips of every arm with the recordings around them, encoded once."
    path = RUNS / f"{world}-{n}.safetensors"
    if not path.is_file():
        save_dataset(toy_dataset(n, vae, seed=1, kind=world, mel=mel, margin=4), path)
    return load_dataset(path)


def measure(model, test: TestSet, seeds: list[int]) -> dict:
    "Losses, loss gaps, scores of both directions, distances of small features; 25 steps."
    data, jobs = test.data, [("v2a", "paper"), ("v2a", "fresh"), ("a2v", "fresh")]
    out = {"loss": validation_loss(model, data)}
    for t in (500, 700):
        gap = loss_gap(model, data.video, audio=data.audio, t=t)
        out[f"gap {t}"] = {k: round(v, 4) for k, v in gap.items()}
    for side, noise in jobs if test.kind == "bounce" else jobs[:2]:
        solver = {"paper": PAPER, "fresh": FRESH}[noise]
        made, found = zip(*(test.sample(model, side, seed=s, solver=solver) for s in seeds))
        name = f"{side}, {noise}"
        out[name] = scores(test.events * len(seeds), sum(found, []))
        features = mel_features if side == "v2a" else latent_features
        true = features(data.audio if side == "v2a" else data.video)
        distances = [frechet_distance(true, features(m)) for m in made]
        key = "fd_mel16" if side == "v2a" else "fd_latent12"
        out[name][key] = round(sum(distances) / len(seeds), 5)
    return out


def one_arm(name, term, steps, *, seed, data, test, sample_seeds) -> dict:
    "Train one arm, keep its model, measure it."
    folder = RUNS / f"{test.kind}-{name.replace(' ', '-').replace(',', '')}-seed{seed}"
    config = TrainConfig(**TUNE, steps=steps, seed=seed, save_every=steps, log_every=20)
    began, result, stopped = time.process_time(), None, None
    try:
        result = train(
            start_model(test.kind),
            data,
            config=config,
            loss_fn=ContrastiveLossFn(term),
            out_dir=folder,
            resume=folder.is_dir(),
        )
    except TrainError as error:
        stopped = str(error)
    if result and result.stopped:  # a signal: the run is saved, and goes on next time
        raise SystemExit(130)
    run = {"world": test.kind, "arm": name, "seed": seed, "eta": term.weight}
    run |= {"negatives": term.negatives, "target": term.target, "bound": term.bound}
    run |= {"steps": steps, "cpu_s": round(time.process_time() - began, 1), "stopped": stopped}
    names = ("step", "loss_video", "loss_audio", "loss_negative", "grad_norm")
    history = read_metrics(folder / "metrics.jsonl")
    run["history"] = [{k: round(m[k], 4) for k in names if k in m} for m in history]
    return run | (measure(result.ema_model, test, sample_seeds) if result else {})


def start(args) -> None:
    "The model that the arms of `dance` start from: its own mel scale, and a sound that waits."
    first, vae = load_model("toy-bounce"), load_vae("tiny")
    data = training_data("dance", args.clips, vae, None)
    changes = {"mel_mean": data.mel_mean, "mel_std": data.mel_std, "audio_snr_scale": 1 / 64}
    model = CMMDUNet(replace(first.config, **changes))
    model.load_state_dict(first.state_dict())
    config = TrainConfig.tiny(steps=3000, seed=3, learning_rate=7e-4, log_every=100)
    folder = RUNS / "dance-start"
    train(model, data, config=config, out_dir=folder, resume=folder.is_dir())


def run(args) -> None:
    "All arms of a lab, seed by seed."
    first, vae = start_model(args.world), load_vae("tiny")
    mel = (first.config.mel_mean, first.config.mel_std)
    data = training_data(args.world, args.clips, vae, mel)
    test = TestSet(args.world, args.test_clips, vae=vae, model=first)
    results = Results(args.out)
    results.about |= about_machine() | {"train_clips": len(data), "train": TUNE, "sample_steps": 25}
    results.about |= {"sample_seeds": args.sample_seeds, args.world: test.about()}
    if not results.has(world=args.world, arm="start"):
        about = {"world": args.world, "arm": "start", "seed": 0}
        results.add(about | measure(first.eval(), test, args.sample_seeds))
    for seed in args.seeds:
        for name, (term, steps) in arms(args.lab, args.compute_ratio).items():
            if args.arms and name not in args.arms:
                continue
            if results.has(world=args.world, arm=name, seed=seed):
                continue
            found = one_arm(
                name, term, steps, seed=seed, data=data, test=test, sample_seeds=args.sample_seeds
            )
            results.add(found)
            print({k: v for k, v in found.items() if k != "history"}, flush=True)


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("what", choices=("start", "run"))
    p.add_argument("--lab", choices=("eta", "negatives", "targets"), default="eta")
    p.add_argument("--world", choices=("bounce", "dance"), default="bounce")
    p.add_argument("--arms", nargs="*", help="only these arms")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--sample-seeds", type=int, nargs="+", default=[0])
    p.add_argument("--clips", type=int, default=2048, help="training clips")
    p.add_argument("--test-clips", type=int, default=48, help="unseen clips")
    p.add_argument("--compute-ratio", type=float, default=2.3, help="cost of a contrastive step")
    p.add_argument("--out", type=Path, default=Path("benchmarks/labs/contrast.json"))
    args = p.parse_args()
    torch.set_num_threads(1)
    {"start": start, "run": run}[args.what](args)


if __name__ == "__main__":
    main()
