"""Clips per second of the data loader alone, beside those of training, on this machine.

python benchmarks/loader.py [--configs tiny,small,paper] [--clips 256] [--out runs/loader.json]

A folder of shards is prepared from films that are made for the purpose (margin 4), with more
clips than the reader keeps in memory. Then the same `StepData` that training uses is read:
in this process and by two workers, without and with the negatives of the contrastive loss
(which are drawn by the process that trains, whatever the workers do). Times are CPU seconds of
this process ("main": what training has to wait for) and of its workers; one thread. The files
are in the page cache, so a slow disk or network comes on top. What is read depends on the clip
alone, so small and paper, whose clips are the same, share the folder and its reading; only the
speed of training is measured for each.
"""

import argparse
import itertools
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from common import about_machine, write_json

from cmmd.contrastive import ContrastiveConfig, ContrastiveLossFn, draw_negatives
from cmmd.core import ClipSpec
from cmmd.datasets import PrepareConfig, ShardDataset, folder_sources, prepare
from cmmd.latents import load_vae
from cmmd.media import write_clip
from cmmd.pipeline import new_model
from cmmd.toy import make_clips
from cmmd.train import StepData, TrainConfig, Trainer, train_step
from cmmd.unet import UNetConfig

BATCH = 8


def cpu(who: int = resource.RUSAGE_SELF) -> float:
    "CPU seconds of this process, or of its children that have ended."
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


def make_folder(root: Path, clip: ClipSpec, n_clips: int) -> ShardDataset:
    "Films of the toy world, cut and encoded by the shipped VAE: the sizes are what counts."
    films, most = root / "films", min(n_clips, 64)
    films.mkdir(parents=True)
    long = clip.with_frames(clip.n_frames + 8 + 3 * (most - 1))
    for i in range(-(-n_clips // most)):
        film = make_clips(1, spec=long, seed=i, kind="dance")
        write_clip(films / f"{i}.mp4", film.video[0], film.waveform[0], spec=long)
    config = PrepareConfig(clip=clip, vae="tiny", stride=3, max_clips=most, shard_sources=2)
    sources = folder_sources(films, test_share=0.0)
    prepare(sources, root / "data", config=config, vae=load_vae("tiny"), workers=1)
    return ShardDataset(root / "data")


def loader_speed(data: ShardDataset, *, workers: int, contrast: bool, steps: int) -> dict:
    "CPU milliseconds per clip in the process that trains and in its workers; clips per second."
    config = TrainConfig(batch_size=BATCH, num_workers=workers)
    spec, n = data.clip, steps * BATCH
    before, wall = (cpu(), cpu(resource.RUSAGE_CHILDREN)), time.perf_counter()
    for pieces in StepData(data, config, num_train_steps=1000).loader(0, steps):
        for batch in pieces if contrast else ():
            generators = [batch.generator(i, "negative") for i in range(BATCH)]
            draw_negatives(batch.dataset, batch.index, generators=generators, spec=spec)
    main, helped = cpu() - before[0], cpu(resource.RUSAGE_CHILDREN) - before[1]
    wall = time.perf_counter() - wall
    busiest = max(main, helped / max(1, workers))  # on as many cores as processes
    return {
        "main_ms": round(1000 * main / n, 3),
        "workers_ms": round(1000 * helped / n, 3),
        "clips_per_s": round(n / busiest, 1),
        "clips_per_s_wall": round(n / wall, 1),
    }


def training_speed(name: str, data: ShardDataset, *, contrast: bool, steps: int) -> float:
    "Clips per CPU second of whole training steps, their batches made beforehand."
    config = getattr(UNetConfig, name)(clip=data.clip, mel_mean=data.mel_mean, mel_std=data.mel_std)
    batch = {"paper": 1, "small": 4}.get(name, 8)
    loss = ContrastiveLossFn(ContrastiveConfig(0.01 if contrast else 0.0))
    plan = TrainConfig.tiny(batch_size=batch, mixed_precision="no")
    trainer = Trainer(new_model(config), data, config=plan, loss_fn=loss, device="cpu")
    ready = list(trainer.data.loader(0, steps + 1))
    train_step(trainer, ready[0])
    before = cpu()
    for pieces in ready[1:]:
        train_step(trainer, pieces)
    return steps * batch / (cpu() - before)


KINDS = list(itertools.product((False, True), (0, 2)))  # contrastive, workers


def measure(names: list[str], n_clips: int) -> Iterator[dict]:
    "One row for each config, loss and number of workers."
    with tempfile.TemporaryDirectory() as root:
        read: dict[ClipSpec, tuple] = {}  # a folder, and how fast it is read, by its clips
        for name in names:
            clip = getattr(UNetConfig, name)().clip
            if clip not in read:
                data, ask = make_folder(Path(root) / str(len(read)), clip, n_clips), n_clips // 4
                found = {
                    kind: loader_speed(data, contrast=kind[0], workers=kind[1], steps=ask)
                    for kind in KINDS
                }
                read[clip] = data, found
            data, found = read[clip]
            steps = 1 if name == "paper" else 4
            trains = [training_speed(name, data, contrast=c, steps=steps) for c in (False, True)]
            for contrast, workers in KINDS:
                speed, fast = trains[contrast], found[contrast, workers]
                row = {"config": name, "loss": "contrastive" if contrast else "plain"}
                row |= {"workers": workers, **fast, "training": round(speed, 3)}
                yield row | {"times": round(fast["clips_per_s"] / speed, 1)}


def main() -> None:
    "Measure, print, write."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configs", default="tiny,small,paper")
    parser.add_argument("--clips", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path("runs/loader.json"))
    asked = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    print(
        *(f"{h:>12}" for h in ("config", "loss", "workers", "main ms", "workers ms")),
        *(f"{h:>12}" for h in ("clips/s", "wall clips/s", "training", "times")),
    )
    report = {"about": about_machine(), "rows": []}
    for row in measure(asked.configs.split(","), asked.clips):
        print(*(f"{v:>12}" for v in row.values()), flush=True)
        report["rows"].append(row)
        write_json(asked.out, report)
    print(f"written to {asked.out}")


if __name__ == "__main__":
    main()
