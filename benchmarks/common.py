"""What the lab scripts share: how a model is sampled and scored on clips whose events are known."""

import datetime
import json
import os
import platform
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from scipy.linalg import sqrtm
from torch import Tensor

from cmmd.core import make_generator
from cmmd.datasets import toy_dataset
from cmmd.guidance import DDIM, generate
from cmmd.latents import decode_video
from cmmd.mel import denormalise_mel
from cmmd.sync import (
    bootstrap_interval,
    chance_f1,
    derangements,
    detect_impacts,
    detect_onsets,
    event_scores,
)
from cmmd.toy import make_clips

TOLERANCES = (0.1, 0.05)
PAPER, FRESH = DDIM(), DDIM(noise_direction="fresh")


class TestSet:
    "Unseen toy clips with their events, the model's view of them, and chance and ceiling."

    def __init__(self, kind: str, n: int, *, vae, model, seed: int = 2):
        spec, mel = model.config.clip, (model.config.mel_mean, model.config.mel_std)
        self.kind, self.vae, self.spec, self.mel = kind, vae, spec, mel
        self.data = toy_dataset(n, vae, spec=spec, seed=seed, kind=kind, mel=mel)
        self.events = make_clips(n, spec=spec, seed=seed, kind=kind).events

    def about(self) -> dict:
        "Chance for this kind of clip, and what the detectors find in the truth itself."
        true = {"v2a": self.heard(self.data.audio)}
        if self.kind == "bounce":
            true["a2v"] = self.seen(self.data.video)
        others = derangements(len(self.events), 20, make_generator(0))
        heard = [[true["v2a"][j] for j in order] for order in others]
        return {
            "clips": len(self.data),
            "chance hits": {label(tol): self.hits(heard, tol) for tol in TOLERANCES},
            "ceiling hits": {side: scores(self.events, found) for side, found in true.items()},
            "chance": {
                label(tol): round(
                    chance_f1(self.events, tolerance=tol, generator=make_generator(0)), 4
                )
                for tol in TOLERANCES
            },
            "ceiling": {side: score(self.events, found) for side, found in true.items()},
        }

    def hits(self, sounds: list[list], tolerance: float) -> float:
        "The mean share of events that are hit by these sounds' onsets."
        shares = [event_scores(self.events, s, tolerance=tolerance).recall for s in sounds]
        return round(float(np.mean(shares)), 4)

    def heard(self, audio: Tensor) -> list[np.ndarray]:
        "Onset times in generated sound."
        return [detect_onsets(m, self.spec) for m in denormalise_mel(audio, *self.mel)]

    def seen(self, video: Tensor) -> list[np.ndarray]:
        "Impact times in generated video, decoded."
        return [detect_impacts(v, self.spec) for v in decode_video(self.vae, video)]

    def sample(
        self, model, side: str, *, seed: int = 0, steps=25, weight=0.0, solver=PAPER, **more
    ) -> tuple[Tensor, list]:
        "What the model makes of every clip's `video` (v2a) or `audio` (a2v), and its events."
        given, made = {"v2a": "video", "a2v": "audio"}[side], []
        for i in range(0, len(self.data), 16):
            out = generate(
                model,
                **{given: getattr(self.data, given)[i : i + 16]},
                guidance_weight=weight,
                num_sample_steps=steps,
                solver=solver,
                generator=make_generator(seed, side, i),
                **more,
            )
            made.append(out.audio if side == "v2a" else out.video)
        made = torch.cat(made)
        return made, self.heard(made) if side == "v2a" else self.seen(made)


def label(tolerance: float) -> str:
    return f"{1000 * tolerance:.0f} ms"


def f1_scores(true: list, found: list) -> dict[str, float]:
    "F1 at each tolerance."
    return {label(tol): round(event_scores(true, found, tolerance=tol).f1, 4) for tol in TOLERANCES}


def scores(true: list, found: list) -> dict[str, float]:
    "F1 at each tolerance, and the share of true events that were hit."
    both = {tol: event_scores(true, found, tolerance=tol) for tol in TOLERANCES}
    hits = {f"hits {label(tol)}": round(s.recall, 4) for tol, s in both.items()}
    return {label(tol): round(s.f1, 4) for tol, s in both.items()} | hits


def score(true: list, found: list) -> dict[str, dict]:
    "F1 and its bootstrap interval over clips at each tolerance."
    out = {}
    for tol in TOLERANCES:
        low, high = bootstrap_interval(true, found, tolerance=tol, generator=make_generator(0))
        f1 = event_scores(true, found, tolerance=tol).f1
        out[label(tol)] = {"f1": round(f1, 4), "low": round(low, 4), "high": round(high, 4)}
    return out


def mel_features(audio: Tensor) -> Tensor:  # (n, c, t) -> (n, 16)
    "Mean and spread over time of eight bands: small features for `frechet_distance`."
    bands = audio.unflatten(1, (8, -1)).mean(2)
    return torch.cat([bands.mean(-1), bands.std(-1)], 1).double()


def latent_features(video: Tensor) -> Tensor:  # (n, f, c, h, w) -> (n, 12)
    "Mean, spread and change from frame to frame of four channels."
    c = video.transpose(1, 2)
    parts = [c.mean((2, 3, 4)), c.std((2, 3, 4)), c.diff(dim=2).abs().mean((2, 3, 4))]
    return torch.cat(parts, 1).double()


def frechet_distance(a: Tensor, b: Tensor) -> float:
    "Of Gaussians fitted to features (n, d): |m - m'|^2 + tr(S + S' - 2 (S S')^1/2)."
    (m, s), (n, t) = ((x.mean(0).numpy(), np.cov(x.numpy().T)) for x in (a, b))
    root = sqrtm(s @ t)
    return float(((m - n) ** 2).sum() + np.trace(s + t - 2 * np.real(root)))


def about_machine() -> dict:
    "Date, machine and version, for every stored result; the GPU where there is one."
    about = {
        "date": str(datetime.date.today()),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} thread",
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        about["gpu"] = f"{torch.cuda.get_device_name(0)} {memory:.0f} GiB"
    return about


def write_json(path: Path, content: dict) -> None:
    "The whole file or none of it: who is killed while writing leaves the last one."
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


Row = tuple[str, float | None, str]  # name, figure, unit; or name, None, why there is no figure


def guarded(name: str, rows: Iterable[Row]) -> Iterator[Row]:
    "The rows, and where an error ends them, its reason under this name (all of it on stderr)."
    try:
        yield from rows
    except Exception as error:
        traceback.print_exc()
        first = str(error).strip().partition("\n")[0]
        yield name, None, f"{type(error).__name__}: {first[:200]}"


class Results:
    "A JSON file of runs that is written after every run; what is in it is not done again."

    def __init__(self, path: Path, about: dict | None = None):
        self.path, stored = path, {"about": {}, "runs": []}
        if path.is_file():
            stored = json.loads(path.read_text())
        self.about, self.runs = stored["about"] | (about or {}), stored["runs"]

    def has(self, **key) -> bool:
        return any(all(r.get(k) == v for k, v in key.items()) for r in self.runs)

    def add(self, run: dict) -> None:
        if self.path.is_file():  # another process may have added to it
            stored = json.loads(self.path.read_text())
            self.about, self.runs = stored["about"] | self.about, stored["runs"]
        self.runs.append(run)
        self.write()

    def write(self) -> None:
        write_json(self.path, {"about": self.about, "runs": self.runs})
