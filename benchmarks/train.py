"""Speed and memory of a training step: plain and contrastive, with and without checkpointing.

    python benchmarks/train.py [--configs tiny small paper] [--threads 1] [--out runs/train.json]
    python benchmarks/train.py one --configs paper --batch-size 2 --checkpointing --steps 1

A step is what `train` does: forward, backward, clipping, Adam, averaged weights. The data are
random latents and mels of the config's shapes, with recordings around the clips, as the shifted
negatives want them. `paper` has the clips that it trains on, 16 x 16 latents; `paper-64` the
64 x 64 of the paper's table of speeds. Each row is a process of its own, which takes the plain and
the contrastive step in turn: their ratio is of medians of one run, and the first round of several
only warms up. On a CPU a step's time is the process's CPU time, and memory its peak resident size
(ru_maxrss) after the first step of each kind, the plain one first. On CUDA the time is the wall's
between two synchronisations, each row has at least 6 rounds of which 2 warm up, and memory is
`torch.cuda.max_memory_allocated`, counted anew for each kind of step. The estimate is that of
`cmmd.scale.memory_parts`, on a CPU with what the process had before the network. What would need
more than --most-gib, or too long, is not run, and has an estimate only. Everything takes about
10 minutes of one quiet core; `one` is a single row, whatever its size. The file is written again
after each row.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from common import about_machine, write_json

from cmmd.contrastive import ContrastiveLossFn, draw_negatives
from cmmd.core import ClipSpec, make_generator, pick_device
from cmmd.datasets import ClipDataset, Recordings
from cmmd.scale import memory_parts
from cmmd.train import TrainConfig, Trainer, joint_loss_fn, train_step
from cmmd.unet import CMMDUNet, UNetConfig

LOSSES = {"plain": joint_loss_fn, "contrastive": ContrastiveLossFn()}
CONFIGS = {
    "tiny": UNetConfig.tiny,
    "small": UNetConfig.small,
    "paper": UNetConfig.paper,
    "paper-64": lambda: UNetConfig.paper(clip=ClipSpec(frame_size=512)),
}
BATCHES = {"tiny": 8, "small": 4, "paper": 1, "paper-64": 1}
STEPS = {"tiny": 8, "small": 4, "paper": 2, "paper-64": 1}
CLOCKS = "cpu_s", "wall_s"  # of a step, not on CUDA and there
CUDA_STEPS = 6  # at least, of a row
MARGIN, GIB = 4, 2**30


def random_clips(config: UNetConfig, n: int) -> ClipDataset:
    "Clips of noise in the shapes of the config's clip, with what lies around them."
    clip, g = config.clip, make_generator(0)
    long = clip.with_frames(clip.n_frames + 2 * MARGIN)
    around = Recordings(
        torch.randn(n, *long.video_shape, generator=g),
        0.1 * torch.randn(n, long.n_samples, generator=g),
    )
    video = around.video[:, MARGIN : MARGIN + clip.n_frames].contiguous()
    audio = torch.randn(n, *clip.audio_shape, generator=g)
    ids = tuple(f"noise-{i}" for i in range(n))
    return ClipDataset(video, audio, ids, config.mel_mean, config.mel_std, around)


def peak(device: torch.device) -> int:
    "The most bytes held so far."
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def make_trainer(args: argparse.Namespace) -> Trainer:
    "A trainer whose optimiser has its state already, so that every step needs the same memory."
    torch.manual_seed(0)
    config = CONFIGS[args.configs[0]]()
    model = CMMDUNet(config)
    if args.checkpointing:
        model.enable_gradient_checkpointing()
    settings = TrainConfig.tiny(
        batch_size=args.batch_size, schedule="constant", mixed_precision=args.precision
    )
    trainer = Trainer(
        model, random_clips(config, max(8, args.batch_size)), config=settings, device=args.device
    )
    for p in trainer.params:
        p.grad = torch.zeros_like(p)
    trainer.optimizer.step()  # moments of zero: no weight moves
    trainer.optimizer.zero_grad(set_to_none=True)
    return trainer


def timed_step(trainer: Trainer, name: str) -> dict[str, float]:
    "One step with a loss: CPU and wall seconds."
    device = trainer.accelerator.device
    batches = trainer.data[trainer.step]
    trainer.loss_fn = LOSSES[name]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    cpu, wall = time.process_time(), time.perf_counter()
    if not train_step(trainer, batches):
        raise SystemExit(f"the {name} step was skipped")
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}


def negatives_cost(trainer: Trainer) -> float:
    "CPU seconds of drawing a step's negatives alone."
    batch, seconds = trainer.data[0][0], []
    for _ in range(5):
        began = time.process_time()
        draw_negatives(
            batch.dataset,
            batch.index,
            generators=[batch.generator(i, "negative") for i in range(len(batch.index))],
            spec=trainer.model.config.clip,
        )
        seconds.append(time.process_time() - began)
    return statistics.median(seconds)


def estimate(args: argparse.Namespace, name: str) -> float:
    "GiB by `memory_parts`: weights, gradients, optimiser, averages, activations."
    parts = memory_parts(
        CONFIGS[args.configs[0]](),
        batch_size=args.batch_size,
        negatives=int(name == "contrastive"),
        gradient_checkpointing=args.checkpointing,
        mixed_precision=args.precision,
        device=pick_device(args.device).type,
    )
    return parts.total / GIB


def measure(args: argparse.Namespace) -> dict:
    "A row: both kinds of step in turn."
    device = pick_device(args.device)
    row = {"before_gib": peak(device) / GIB}
    trainer = make_trainer(args)
    kinds = [name for name in LOSSES if args.only in (None, name)]
    rounds: dict[str, list] = {name: [] for name in kinds}
    for i in range(args.steps):
        for name in kinds:
            if device.type == "cuda" and not i:
                torch.cuda.reset_peak_memory_stats(device)
            rounds[name].append(timed_step(trainer, name))
            if not i:
                row[name] = {"peak_gib": peak(device) / GIB}
    for name in kinds:
        kept = rounds[name][min(args.steps - 1, 2 if device.type == "cuda" else 1) :]
        for clock in ("cpu", "wall"):
            row[name][f"{clock}_s"] = statistics.median(r[clock] for r in kept)
        row[name]["clips_per_s"] = args.batch_size / row[name]["wall_s"]
    row["negatives_s"] = negatives_cost(trainer)
    if len(kinds) == 2:
        clock = CLOCKS[device.type == "cuda"]
        row["ratio"] = row["contrastive"][clock] / row["plain"][clock]
    return row


def describe(args: argparse.Namespace) -> dict:
    "What a row is about."
    names = ("batch_size", "checkpointing", "precision", "threads", "steps")
    return {"config": args.configs[0], **{n: getattr(args, n) for n in names}}


def rounded(value):
    "Four digits are enough."
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def child(args: argparse.Namespace, **changes) -> dict:
    "A row from a process of its own, or the reason why there is none."
    args = argparse.Namespace(**vars(args) | changes)
    row = describe(args)
    kinds = [name for name in LOSSES if args.only in (None, name)]
    row["estimate_gib"] = {name: estimate(args, name) for name in kinds}
    fit = [name for name in kinds if row["estimate_gib"][name] + 1 < args.most_gib]
    if not fit or args.long:  # + 1: Python and PyTorch themselves
        return rounded(row)
    if len(fit) < len(LOSSES):
        args.only = fit[0]
    command = [sys.executable, __file__, "one", "--configs", args.configs[0]]
    for name in ("batch_size", "precision", "threads", "steps", "device", "only"):
        value = getattr(args, name)
        command += [f"--{name.replace('_', '-')}", str(value)] if value is not None else []
    command += ["--checkpointing"] if args.checkpointing else []
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if answer.returncode:
        return rounded(row | {"failed": answer.returncode})
    return rounded(row | json.loads(answer.stdout.splitlines()[-1]))


def has_bf16(device: torch.device) -> bool:
    "Whether bfloat16 is the machine's own and not emulated."
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    flags = Path("/proc/cpuinfo")
    return flags.is_file() and any(x in flags.read_text() for x in ("avx512_bf16", "amx_bf16"))


def most_gib(device: torch.device) -> float:
    "What a row may need unless it is said."
    if device.type != "cuda":
        return 20.0
    return 0.9 * torch.cuda.get_device_properties(device).total_memory / GIB


def rows(args: argparse.Namespace) -> Iterator[dict]:
    "All rows, one by one."
    device = pick_device(args.device)
    cuda = device.type == "cuda"
    precisions, least = ["no", *(["bf16"] if has_bf16(device) else [])], CUDA_STEPS if cuda else 1
    for name in args.configs:
        slow = name == "paper-64" and not cuda
        given = {"configs": [name], "long": False}
        given["steps"] = args.steps or max(STEPS[name], least)
        given["batch_size"] = args.batch_size or BATCHES[name]
        for precision in precisions:
            for checkpointing in (False, True):
                only = "plain" if slow and checkpointing else args.only
                how = {"checkpointing": checkpointing, "precision": precision, "only": only}
                yield child(args, **given | how)
        given |= {"only": "contrastive", "steps": least, "long": slow}
        given["precision"] = precisions[-1] if cuda else "no"  # CUDA: as training does it there
        for size, checkpointing in ((2, False), (8, False), (8, True)):
            yield child(args, **given | {"batch_size": size, "checkpointing": checkpointing})


HEAD = ("config", "batch", "ckpt", "type", "step", "{} s", "clips/s", "GiB", "estimate", "ratio")
WIDTHS = (9, 6, 5, 5, 12, 8, 8, 7, 9, 6)


def aligned(cells) -> str:
    "A line of the table."
    return " ".join(f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS))


def lines(row: dict, clock: str) -> list[str]:
    "A row of the table per kind of step; a dash where it was not run."
    found = []
    about = [row["config"], row["batch_size"], "yes" if row["checkpointing"] else "no"]
    about += [row["precision"].replace("no", "fp32")]
    for name, guess in row["estimate_gib"].items():
        cells = ["-"] * 3
        if name in row:
            r = row[name]
            cells = [f"{r[clock]:.4g}", f"{r['clips_per_s']:.3g}", f"{r['peak_gib']:.2f}"]
        guess += row.get("before_gib", 0)
        ratio = f"{row['ratio']:.2f}" if "ratio" in row and name == "contrastive" else ""
        found.append(aligned([*about, name, *cells, f"{guess:.2f}", ratio]))
    return found


def main() -> None:
    "Measure, print, write."
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("what", nargs="?", choices=("all", "one"), default="all", help="one: a row")
    p.add_argument("--configs", nargs="+", choices=tuple(BATCHES), default=tuple(BATCHES))
    p.add_argument("--steps", type=int, help=f"rounds of a row; default {STEPS}")
    p.add_argument("--batch-size", type=int, help=f"clips of a step; default {BATCHES}")
    p.add_argument("--only", choices=tuple(LOSSES), help="only this kind of step")
    p.add_argument("--checkpointing", action="store_true", help="of `one`")
    p.add_argument("--precision", choices=("no", "bf16"), default="no", help="of `one`")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--device", default="auto")
    p.add_argument("--most-gib", type=float, help="no row that needs more; default 20, CUDA's 90%%")
    p.add_argument("--out", type=Path, default=Path("runs/train.json"))
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    if args.what == "one":
        args.steps = args.steps or STEPS[args.configs[0]]
        args.batch_size = args.batch_size or BATCHES[args.configs[0]]
        print(json.dumps(measure(args)))
        return
    device = pick_device(args.device)
    clock = CLOCKS[device.type == "cuda"]
    args.most_gib = args.most_gib or most_gib(device)
    report = {"about": about_machine() | {"device": str(device), "clock": clock}, "rows": []}
    print(aligned(HEAD).replace("{}", {"cpu_s": "CPU", "wall_s": "wall"}[clock]))
    for row in rows(args):
        report["rows"].append(row)
        print(*lines(row, clock), sep="\n", flush=True)
        write_json(args.out, report)
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
