"""CMMD against its matched control on 200 unseen clips: equal start, steps, data, order, noise.

    python benchmarks/contrast.py run --lab eta --arms plain "eta 0.01"     the six models
    python benchmarks/compare.py                                 -> benchmarks/compare.json

Three training seeds and two sampling seeds for the paper's sampler; the shipped pair (training
seed 0) for other samplers and the best recipes. Intervals are 95% bootstraps over clips, the same
clips for both arms, all seeds of a clip together. About 25 minutes of one CPU core; what is in the
file is not repeated.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from common import FRESH, PAPER, TOLERANCES, Results, TestSet, about_machine, label, score, scores

from cmmd.guidance import DDIM
from cmmd.latents import load_vae
from cmmd.pipeline import load_model
from cmmd.sync import match_events

ARMS = {"ncmmd": "plain", "cmmd": "eta-0.01"}
CLEAN = DDIM(noise_direction="fresh", time_power=1.0)
TWICE = DDIM(noise_direction="fresh", time_power=1.0, n_resample=2)
COMPARED = {  # name -> side, solver, guidance weight, steps, sampling seeds
    "v2a, paper sampler": ("v2a", PAPER, 0.0, 25, (0, 1)),
    "v2a, fresh noise": ("v2a", FRESH, 0.0, 25, (0,)),
    "a2v, fresh noise": ("a2v", FRESH, 0.0, 25, (0,)),
}
RECIPES = {  # of CMMD, or of what both arms started from
    "v2a, fresh noise, lambda 2": ("v2a", FRESH, 2.0, 25, (0,)),
    "a2v, fresh noise, lambda 0.5, 50 even steps": ("a2v", CLEAN, 0.5, 50, (0,)),
    "a2v, fresh noise, lambda 0.3, 40 even steps, each twice": ("a2v", TWICE, 0.3, 40, (0,)),
}
OWN = {"a2v, fresh noise, lambda 0.5, 50 even steps": ("cmmd", "start")}
DANCE = {"dance: v2a, fresh noise, lambda 2": ("v2a", FRESH, 2.0, 25, (0,))}


def counts(true: list, found: list, tolerance: float) -> np.ndarray:
    "Hits and events, true and generated together, of each clip: (n, 2)."
    hits = [len(match_events(t, g, tolerance)) for t, g in zip(true, found)]
    return np.array([[h, len(t) + len(g)] for h, t, g in zip(hits, true, found)], float)


def f1(table: np.ndarray) -> float:  # (..., 2)
    hits, events = table.reshape(-1, 2).sum(0)
    return 2 * hits / max(events, 1)


def compare(a: np.ndarray, b: np.ndarray, n_draws: int = 2000) -> dict:
    "F1 of two arms, counts (runs, clips, 2) each, and the bootstrapped difference b - a."
    rng, n = np.random.default_rng(0), a.shape[1]
    draws = [rng.integers(0, n, n) for _ in range(n_draws)]
    differences = [f1(b[:, d]) - f1(a[:, d]) for d in draws]
    low, high = np.quantile(differences, [0.025, 0.975])
    by_run = [round(f1(y) - f1(x), 4) for x, y in zip(a, b)]
    return {
        "ncmmd": round(f1(a), 4),
        "cmmd": round(f1(b), 4),
        "difference": round(f1(b) - f1(a), 4),
        "low": round(float(low), 4),
        "high": round(float(high), 4),
        "difference of each run": by_run,
    }


def run_once(test: TestSet, model, job: tuple, seed: int) -> dict:
    "Scores, and the event times of every clip as text."
    side, solver, weight, steps, _ = job
    began = time.process_time()
    _, found = test.sample(model, side, seed=seed, steps=steps, weight=weight, solver=solver)
    out = {"cpu_s": round(time.process_time() - began, 1), "scores": score(test.events, found)}
    out["hits"] = scores(test.events, found)
    return out | {"found": [" ".join(f"{t:.4f}" for t in times) for times in found]}


def summary(true: list, runs: list[dict]) -> dict:
    "Both arms of one job and their difference, at each tolerance."
    found = {
        arm: [[np.array(x.split(), float) for x in r["found"]] for r in runs if r["arm"] == arm]
        for arm in ARMS
    }
    return {
        label(tol): compare(
            *(np.stack([counts(true, times, tol) for times in found[arm]]) for arm in ARMS)
        )
        for tol in TOLERANCES
    }


def run_world(world: str, todo: list, args) -> None:
    "All jobs (name, job, training seed) of one world that are not in the file, and their summary."
    names = {
        (arm, seed): f"{world}-{name}-seed{seed}"
        for arm, name in ARMS.items()
        for _, _, seed in todo
    }
    models = {key: load_model(args.models / name / "model") for key, name in names.items()}
    first, models["start", 0] = models["cmmd", 0], load_model("toy-bounce")
    test = TestSet(world, args.clips, vae=load_vae("tiny"), model=first, seed=args.toy_seed)
    results = Results(args.out, about_machine() | {"toy_seed": args.toy_seed})
    results.about[world] = test.about()
    for name, job, seed in todo:
        for arm in ARMS if name in COMPARED else OWN.get(name, ("cmmd",)):
            for sampling in job[4]:
                key = {"job": name, "arm": arm, "seed": seed, "sampling_seed": sampling}
                if not results.has(**key):
                    results.add(key | run_once(test, models[arm, seed], job, sampling))
                    print(key, results.runs[-1]["scores"], flush=True)
    for name in dict.fromkeys(name for name, _, _ in todo if name in COMPARED):
        runs = [r for r in results.runs if r["job"] == name]
        results.about.setdefault("summary", {})[name] = summary(test.events, runs)
    results.write()


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--clips", type=int, default=200)
    p.add_argument(
        "--toy-seed", type=int, default=78, help="of the clips; nothing was chosen on it"
    )
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="training seeds")
    p.add_argument("--models", type=Path, default=Path("runs/contrast"))
    p.add_argument("--out", type=Path, default=Path("benchmarks/compare.json"))
    args = p.parse_args()
    torch.set_num_threads(1)
    first = "v2a, paper sampler"
    todo = [(first, COMPARED[first], seed) for seed in args.seeds]
    run_world("bounce", todo + [(n, j, 0) for n, j in (COMPARED | RECIPES).items()], args)
    run_world("dance", [(n, j, 0) for n, j in DANCE.items()], args)


if __name__ == "__main__":
    main()
