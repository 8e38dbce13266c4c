"""What each switch of the sampler does, at equal numbers of evaluations of the network.

    python benchmarks/guidance.py            -> benchmarks/labs/guidance.json
    python benchmarks/guidance.py --only usual thirds

The shipped `toy-bounce` makes the other stream of 32 unseen clips, in both directions. About 15 s
of one CPU core for each guided setting and seed, 7 s for each unguided one; 12 minutes for each of
the two seeds. The file is written after every run, and what is in it is not done again.
nbs/50_guidance.ipynb reads it.
"""

import argparse
import itertools
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from common import Results, TestSet, about_machine, frechet_distance, latent_features
from common import mel_features, score

from cmmd.core import make_generator
from cmmd.guidance import DDIM, guided_predict, predict
from cmmd.latents import load_vae
from cmmd.pipeline import load_model

EVALUATIONS = 24
WEIGHTS = {"v2a": (2.0, 30.0, 0.5), "a2v": (0.5, 2.0, 0.1, 1.0)}  # beside 0 and the usual one
NORMALISED = {"v2a": (0.1, 0.3, 0.03), "a2v": (0.3, 1.0, 0.1)}
USUAL = {"v2a": 8.0, "a2v": 0.2}  # the weight that the other groups use
NOISE = {"v2a": "model", "a2v": "fresh"}  # and the noise, where one is enough
THIRDS = ((2 / 3, 1.0), (1 / 3, 2 / 3), (0.0, 1 / 3))


def settings(group: str, side: str) -> list[tuple[float, dict]]:
    "Weights with the switches of `DDIM` that differ from its defaults."
    usual, noise, both = USUAL[side], NOISE[side], ("model", "fresh")
    fresh = {"noise_direction": "fresh"}
    return {
        "usual": [(w, {"noise_direction": d}) for w in (0.0, usual) for d in both],
        "weights": [(w, {"noise_direction": d}) for d in reversed(both) for w in WEIGHTS[side]],
        "thirds": [(usual, {"noise_direction": noise, "guided_times": t}) for t in THIRDS],
        "directions": [
            (w, {"noise_direction": d})
            for w, d in ((usual, "initial"), (usual, "rederived"), (0.0, "initial"))
        ],
        "condition": [
            (w, {"noise_direction": d, "condition_noise": "fresh"})
            for w, d in ((0.0, "model"), (0.0, "fresh"), (usual, noise))
        ],
        "resampling": [
            (w, {"noise_direction": d, "n_resample": 2})
            for w, d in ((0.0, "model"), (usual, "model"), (usual, "fresh"))
        ],
        "normalised": [(w, {"gradient": "normalised"} | fresh) for w in NORMALISED[side]]
        + [(NORMALISED[side][1], {"gradient": "normalised", "guided_times": (1 / 3, 1.0)} | fresh)],
        "grid": [(usual, {"time_power": p} | fresh) for p in (1.0, 2.0)],
    }[group]


GROUPS = ("usual", "thirds", "weights", "resampling")
GROUPS += ("condition", "directions", "normalised", "grid")


def measure(model, test: TestSet, side: str, weight: float, switches: dict, seed: int) -> dict:
    "F1 with intervals over clips, the distance of small features, evaluations, backward passes."
    solver = DDIM(**switches)
    steps = EVALUATIONS // solver.n_resample
    low, high = (model.config.num_train_steps * share for share in solver.guided_times)
    times = [t for t, *_ in solver.steps(model, steps)]
    run = key(side, weight, switches, seed) | {"evaluations": len(times)}
    run["backward"] = sum(low <= t <= high for t in times) if weight else 0
    began = time.process_time()
    made, found = test.sample(model, side, seed=seed, steps=steps, weight=weight, solver=solver)
    run["cpu_s"] = round(time.process_time() - began, 1)
    name, features = {
        "v2a": ("fd_mel16", mel_features),
        "a2v": ("fd_latent12", latent_features),
    }[side]
    true = features(test.data.audio if side == "v2a" else test.data.video)
    distance = frechet_distance(true, features(made))
    return run | score(test.events, found) | {name: round(distance, 5)}


def key(side: str, weight: float, switches: dict, seed: int) -> dict:
    "What tells a run from every other, as it stands in the file."
    solver = {k: v for k, v in asdict(DDIM(**switches)).items() if k != "on_step"}
    solver["guided_times"] = [round(t, 4) for t in solver["guided_times"]]
    return {"side": side, "weight": weight, **solver, "seed": seed}


def cost(model, test: TestSet) -> dict:
    "CPU time of one evaluation of 16 clips at n = 500, without and with guidance; medians of 7."
    clean, out = test.data.batch(range(16)), {}
    z = [torch.randn(x.shape, generator=make_generator(0)) for x in clean]
    levels = (torch.tensor(0.5), torch.tensor(0.1))
    for name, target in (("v2a", 1), ("a2v", 0)):
        guided = {"target": target, "condition": clean[1 - target], "guidance_weight": 1.0}
        calls = {"plain": (predict, {}), "guided": (guided_predict, guided)}
        for label, (function, extra) in calls.items():
            times = []
            for _ in range(8):
                began = time.process_time()
                with torch.no_grad():
                    if extra:
                        function(model, z, 500, alpha_bars=levels, **extra)
                    else:
                        function(model, z, 500, levels)
                times.append(1000 * (time.process_time() - began) / 16)
            out.setdefault(name, {})[f"{label}_ms"] = round(float(np.median(times[1:])), 2)
        out[name]["ratio"] = round(out[name]["guided_ms"] / out[name]["plain_ms"], 2)
    return out


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--only", nargs="+", choices=GROUPS, default=GROUPS)
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    p.add_argument("--test-clips", type=int, default=32)
    p.add_argument("--out", type=Path, default=Path("benchmarks/labs/guidance.json"))
    args = p.parse_args()
    torch.set_num_threads(1)
    model, vae = load_model("toy-bounce"), load_vae("tiny")
    test = TestSet("bounce", args.test_clips, vae=vae, model=model)
    about = about_machine() | {"model": "toy-bounce", "evaluations": EVALUATIONS}
    about |= {"seeds": args.seeds, "bounce": test.about(), "cost": cost(model, test)}
    results = Results(args.out, about)
    for seed, group, side in itertools.product(args.seeds, args.only, ("v2a", "a2v")):
        for weight, switches in settings(group, side):
            if results.has(**key(side, weight, switches, seed)):
                continue
            results.add(measure(model, test, side, weight, switches, seed))
            run = results.runs[-1]
            print(seed, side, weight, switches, run["100 ms"], run["50 ms"], flush=True)


if __name__ == "__main__":
    main()
