"""How many evaluations of the network each solver needs for the same quality.

    python benchmarks/solvers.py             -> benchmarks/labs/solvers.json
    python benchmarks/solvers.py --seeds 1   a second sampling seed, added to the file

The shipped `toy-bounce` makes sounds for 32 unseen films and films for 16 unseen sounds, without
guidance and with it, by every solver at 20, 10, 50 and 25 evaluations, beside the paper's DDIM
with 200 even steps. About 20 minutes of one CPU core for each sampling seed; the file is written
after every run, and what is in it is not done again. nbs/51_solvers.ipynb reads it.
"""

import argparse
import time
from pathlib import Path

import torch
from common import FRESH, TOLERANCES, Results, TestSet, about_machine, frechet_distance, label
from common import latent_features, mel_features, score

from cmmd.guidance import DDIM
from cmmd.latents import load_vae
from cmmd.pipeline import load_model
from cmmd.solvers import DPMSolver, UniPC
from cmmd.sync import event_scores

PAPER_STEPS, FEW, MORE_STEPS = 200, (20, 10), (50, 25)
SOLVERS = {
    "DDIM": DDIM(),
    "DDIM, fresh noise": FRESH,
    "2M": DPMSolver(noise_direction="rederived"),
    "2M, model noise": DPMSolver(noise_direction="model"),
    "2M SDE": DPMSolver(stochastic=True, noise_direction="rederived"),
    "UniPC": UniPC(),
}
WEIGHTS = {"v2a": 2.0, "a2v": 0.2}
MORE = {"v2a": 8.0, "a2v": 0.5}  # at 20 evaluations: fewer steps push less often


def jobs(seed: int) -> list[tuple]:
    "Solver's name, direction, weight, evaluations and seed; what matters most first."
    v2a, a2v = ("v2a", WEIGHTS["v2a"]), ("a2v", WEIGHTS["a2v"])
    plain = [("v2a", 0.0), ("a2v", 0.0)]
    order = [(plain[0], FEW), (a2v, FEW), (plain[0], MORE_STEPS), (v2a, FEW), (plain[1], FEW)]
    out = []
    for (side, weight), counts in order + [(x, MORE_STEPS) for x in (a2v, v2a, plain[1])]:
        if counts is FEW:
            out.append(("paper", side, weight, PAPER_STEPS, seed))
        # without guidance the noise that is left *is* the model's
        names = [n for n in SOLVERS if weight or n != "2M, model noise"]
        out += [(name, side, weight, s, seed) for s in counts for name in names]
    return out + [(name, side, MORE[side], 20, seed) for side in MORE for name in SOLVERS]


def clip_counts(true: list, found: list) -> dict[str, str]:
    "Hits and (true + found) events of every clip, as text, at each tolerance."
    out = {}
    for tol in TOLERANCES:
        scores = [event_scores([t], [f], tolerance=tol) for t, f in zip(true, found)]
        out[label(tol)] = " ".join(f"{s.n_hit}/{s.n_true + s.n_generated}" for s in scores)
    return out


def one_run(job, test: TestSet, model, detection_s: float) -> dict:
    "Sample, detect, score."
    name, side, weight, steps, seed = job
    solver = SOLVERS.get(name, DDIM(time_power=1.0))
    began = time.process_time()
    made, found = test.sample(model, side, seed=seed, steps=steps, weight=weight, solver=solver)
    seconds = time.process_time() - began - detection_s
    features = mel_features if side == "v2a" else latent_features
    true = test.data.audio if side == "v2a" else test.data.video
    distance = frechet_distance(features(true), features(made))
    run = {"solver": name, "side": side, "weight": weight, "evaluations": steps, "seed": seed}
    run |= {"clips": len(found), "cpu_s_per_clip": round(seconds / len(found), 4)}
    run |= {"fd_mel16" if side == "v2a" else "fd_latent12": round(distance, 5)}
    return run | {"f1": score(test.events, found), "counts": clip_counts(test.events, found)}


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the samplers' noise")
    p.add_argument("--clips", type=int, nargs=2, default=[32, 16], help="for V2A and for A2V")
    p.add_argument("--out", type=Path, default=Path("benchmarks/labs/solvers.json"))
    args = p.parse_args()
    torch.set_num_threads(1)
    model, vae = load_model("toy-bounce"), load_vae("tiny")
    sizes = dict(zip(WEIGHTS, args.clips))
    tests = {s: TestSet("bounce", n, vae=vae, model=model) for s, n in sizes.items()}
    about = about_machine() | {"model": "toy-bounce"}
    about |= {side: test.about() for side, test in tests.items()}
    results, detection_s = Results(args.out, about), {}
    for side, test in tests.items():
        began = time.process_time()
        test.heard(test.data.audio) if side == "v2a" else test.seen(test.data.video)
        detection_s[side] = time.process_time() - began
    names = ("solver", "side", "weight", "evaluations", "seed")
    for job in [job for seed in args.seeds for job in jobs(seed)]:
        if results.has(**dict(zip(names, job))):
            continue
        run = one_run(job, tests[job[1]], model, detection_s[job[1]])
        results.add(run)
        found = [run["f1"][label(tol)]["f1"] for tol in TOLERANCES]
        print(*job, run["cpu_s_per_clip"], *found, flush=True)


if __name__ == "__main__":
    main()
