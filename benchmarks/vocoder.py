"""The vocoder beside Griffin-Lim: quality, real recordings, speed, generated mels, two labs.

    python benchmarks/vocoder.py quality      unseen procedural sounds and toy clips (4 minutes)
    python benchmarks/vocoder.py real         recordings, file by file, where they are at hand
    python benchmarks/vocoder.py speed        real-time factor, FLOPs, memory (2 minutes)
    python benchmarks/vocoder.py generated    mels that `toy-bounce` has made (1 minute)
    python benchmarks/vocoder.py lab          sequence length and mel weight (20 minutes)

Minutes of one CPU core. `lab` writes benchmarks/labs/vocoder.json, the others a section each of
benchmarks/vocoder.json. The file is written after each part; what is in it is not done again, as
long as the vocoder's weights are the same. Intervals are 95% bootstraps over sounds.

`stft` is the sum of the two parts of `cmmd.melgan.stft_errors` (spectral convergence, and log
magnitude in decades), `mel` the mean absolute difference of the log-mels in decades over all cells,
`mel loud` the same over cells in which either is above -3. For orientation: silence, the worst that
is polite, and the true sound 128 samples late, whose phases alone are another.
"""

import argparse
import hashlib
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import onsets
import torch
from common import FRESH, Results, TestSet, about_machine, score
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import cmmd.mel
import cmmd.melgan
import cmmd.sounds
import cmmd.sync
import cmmd.toy
from cmmd.core import ClipSpec, data_path, make_generator
from cmmd.latents import load_vae
from cmmd.media import MediaError, read_media
from cmmd.mel import denormalise_mel, griffin_lim, log_mel
from cmmd.melgan import MelGANDiscriminator, MelGANGenerator, Vocoder
from cmmd.melgan import load_vocoder, match_mel, stft_errors
from cmmd.pipeline import load_model
from cmmd.soundbank import toy_sounds
from cmmd.sounds import SOUND_KINDS, make_sounds
from cmmd.sync import derangements, detect_onsets, detect_onsets_waveform, match_events
from cmmd.toy import make_clips
from cmmd.vocoder import VocoderConfig, train_vocoder

RUNS = Path("runs/vocoder")
SEED = 1  # of the sounds here; the shipped vocoder was trained on those of seed 0
SECONDS, TOLERANCE = 4.1, 0.010
SHIPPED, RIVAL = "vocoder", "griffin-lim"
MEASURES = ("stft convergence", "stft log", "stft", "mel", "mel loud")
PERCUSSIVE = ("bar", "drum", "bounce")  # kinds whose every onset is a strike


class Store:
    "A JSON file of sections that is written after every part."

    def __init__(self, path: Path, weights: str):
        self.path, self.weights = path, weights
        self.found = json.loads(path.read_text()) if path.is_file() else {}

    def section(self, name: str) -> dict:
        "What is stored there of these weights; empty when it was of others."
        part = self.found.get(name, {})
        if part.get("about", {}).get("weights") != self.weights:
            part = self.found[name] = {}
        part["about"] = about_machine() | {"weights": self.weights}
        return part

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.found, indent=1) + "\n")
        partial.replace(self.path)


def fingerprint(name: str) -> str:
    "Of a vocoder's weights: 16 hex digits."
    shipped = data_path("weights", name)
    folder = shipped if shipped.is_dir() else Path(name)
    file = folder / "diffusion_pytorch_model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def speakers(vocoder: Vocoder) -> dict[str, Callable[[Tensor], Tensor]]:
    "Each way from a mel (b, n_mels, t) to a waveform."
    bare, spec = Vocoder(vocoder.model, rounds=0), vocoder.spec

    def lim(mel: Tensor) -> Tensor:
        return griffin_lim(mel, spec, generator=make_generator(0, "vocoder"), n_iter=32)

    return {
        SHIPPED: lambda mel: vocoder(mel, spec),
        f"{SHIPPED}, no match": lambda mel: bare(mel, spec),
        RIVAL: lim,
        f"{RIVAL}, matched": lambda mel: match_mel(lim(mel), mel, spec, rounds=2),
    }


def errors(made: Tensor, true: Tensor, spec: ClipSpec) -> Tensor:
    "Each measure of each sound: (b, samples) twice -> (b, 5); `mel loud` is NaN in silence."
    convergence, logs = stft_errors(made, true)
    a, b = log_mel(made, spec), log_mel(true, spec)
    apart, loud = (a - b).abs(), torch.maximum(a, b) > -3
    over = (apart * loud).sum((1, 2)) / loud.sum((1, 2))
    return torch.stack([convergence, logs, convergence + logs, apart.mean((1, 2)), over], 1)


def whole_columns(wave: Tensor, spec: ClipSpec) -> Tensor:
    "Cut to a whole number of mel columns."
    return wave[..., : wave.shape[-1] // spec.hop_length * spec.hop_length]


def rounded(values: dict) -> dict:
    return {k: round(float(v), 4) for k, v in values.items()}


def interval(values: np.ndarray) -> dict:
    "Mean over sounds and its bootstrap interval."
    values = values[~np.isnan(values)]
    draws = np.random.default_rng(0).integers(0, len(values), (2000, len(values)))
    low, high = np.quantile(values[draws].mean(1), [0.025, 0.975])
    return rounded({"mean": values.mean(), "low": low, "high": high})


def ratio(ours: np.ndarray, theirs: np.ndarray) -> dict:
    "Mean of ours over mean of theirs, the same sounds drawn for both."
    some = ~np.isnan(ours) & ~np.isnan(theirs)
    ours, theirs = ours[some], theirs[some]
    draws = np.random.default_rng(0).integers(0, len(ours), (2000, len(ours)))
    low, high = np.quantile(ours[draws].mean(1) / theirs[draws].mean(1), [0.025, 0.975])
    return rounded({"ratio": ours.mean() / theirs.mean(), "low": low, "high": high})


def kept(true: list, found: list, tolerance: float = TOLERANCE) -> dict:
    "Share of the true onsets that were found, one to one, its interval, and how many were added."
    hits = np.array([len(match_events(t, g, tolerance)) for t, g in zip(true, found)])
    counts, made = np.array([len(t) for t in true]), sum(len(g) for g in found)
    draws = np.random.default_rng(0).integers(0, len(hits), (2000, len(hits)))
    shares = hits[draws].sum(1) / np.maximum(counts[draws].sum(1), 1)
    low, high = np.quantile(shares, [0.025, 0.975])
    found = {"share": hits.sum() / max(counts.sum(), 1), "low": low, "high": high}
    return rounded(found | {"added": (made - hits.sum()) / max(made, 1), "onsets": counts.sum()})


def unseen(kind: str) -> tuple[Tensor, list]:
    "Sounds of one kind (n, samples), none of them silent, and their exact onsets in s."
    if kind in SOUND_KINDS:
        made = make_sounds(16, duration=SECONDS, seed=SEED, kinds=(kind,))
        loud = made.waveform.abs().amax(1) > 0.01  # silence is measured by itself
        some = loud.nonzero()[:10, 0].tolist()
        return made.waveform[some], [made.onsets[i] for i in some]
    spec = replace(ClipSpec.toy(n_frames=round(10 * SECONDS)), frame_size=8)
    clips = make_clips(32, spec=spec, seed=SEED, kind=kind)
    return clips.waveform, list(clips.events)


@lru_cache
def code() -> str:
    "Of the modules that a stored measurement depends on: 8 hex digits."
    parts = (cmmd.mel, cmmd.melgan, cmmd.sounds, cmmd.toy, cmmd.sync, onsets)
    text = b"".join(Path(part.__file__).read_bytes() for part in parts)
    return hashlib.sha256(text).hexdigest()[:8]


def cached(key: str, way: str, weights: str, make: Callable[[], dict]) -> dict:
    "What `make` returns, kept in runs/: an interruption costs little, Griffin-Lim waits for none."
    name = f"{key}, {way}, {code()}" + f", {weights}" * way.startswith(SHIPPED)
    path = RUNS / "cache" / f"{name}.json"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(make()))
        print("measured", name, flush=True)
    return json.loads(path.read_text())


def late(wave: Tensor) -> Tensor:
    "128 samples of silence, then the sound, as long as before."
    return torch.nn.functional.pad(wave, (128, 0))[:, : wave.shape[1]]


def measure_kind(kind: str, ways: dict, spec: ClipSpec, weights: str) -> dict:
    "Errors and onsets of each sound of a kind for each way."
    true, exact = unseen(kind)
    true = whole_columns(true, spec)
    pieces = log_mel(true, spec).split(8)
    lines = {"silence": torch.zeros_like, "true sound": torch.clone, "true sound, 8 ms late": late}

    def row(way: str) -> dict:
        if way in lines:
            wave = lines[way](true)
        else:
            wave = torch.cat([ways[way](mel) for mel in pieces])
        times = [onsets.onset_times(w, spec.sample_rate).tolist() for w in wave]
        return {"errors": errors(wave, true, spec).tolist(), "onsets": times}

    names = (*lines, *ways)
    found = {way: cached(f"quality, {kind}", way, weights, lambda: row(way)) for way in names}
    return {"exact": [list(t) for t in exact], "ways": found}


def group_errors(some: list[dict], way: str) -> np.ndarray:  # (sounds, 5)
    return np.array([row for table in some for row in table["ways"][way]["errors"]], dtype=float)


def group_onsets(some: list[dict], way: str) -> list:
    return [times for table in some for times in table["ways"][way]["onsets"]]


def group_report(some: list[dict]) -> dict:
    "Errors, ratios to Griffin-Lim and onsets of a group of kinds."
    out, true = {"sounds": len(group_onsets(some, RIVAL))}, group_onsets(some, "true sound")
    rival = group_errors(some, RIVAL)
    for way in some[0]["ways"]:
        found = group_errors(some, way)
        out[way] = {m: interval(found[:, i]) for i, m in enumerate(MEASURES)}
        if way.startswith(SHIPPED) or way.endswith("matched"):
            name = f"over {RIVAL}"
            out[way][name] = {m: ratio(found[:, i], rival[:, i]) for i, m in enumerate(MEASURES)}
        out[way]["onsets kept"] = kept(true, group_onsets(some, way))
    order = derangements(len(true), 1, make_generator(0))[0]
    found = group_onsets(some, SHIPPED)
    out["chance of an onset"] = kept(true, [found[j] for j in order])["share"]
    return out


def silence(ways: dict, spec: ClipSpec) -> dict:
    "Peaks of what comes out where nothing goes in."
    floor = torch.full((1, spec.n_mels, 256), math.log10(spec.mel_floor))
    still = log_mel(torch.zeros(1, 256 * spec.hop_length), spec)
    mels = {"mel at its floor": floor, "mel of a silent wave": still}
    return {
        name: {way: float(f"{speak(mel).abs().max():.2e}") for way, speak in ways.items()}
        for name, mel in mels.items()
    }


def quality(args) -> None:
    "Errors, onsets and silence on unseen sounds."
    vocoder = load_vocoder(args.model)
    ways, spec, store = speakers(vocoder), vocoder.spec, Store(args.out, fingerprint(args.model))
    part = store.section("quality")
    part["about"] |= {"seed": SEED, "seconds": SECONDS, "tolerance": TOLERANCE}
    part["silence, peak"] = silence(ways, spec)
    names = (*SOUND_KINDS, "bounce", "dance")
    kinds = {kind: measure_kind(kind, ways, spec, store.weights) for kind in names}
    groups = {"all": list(kinds), "procedural": list(SOUND_KINDS), **{k: [k] for k in kinds}}
    for name, members in groups.items():
        part[name] = group_report([kinds[k] for k in members])
    strikes = [kinds[k] for k in PERCUSSIVE]
    exact = [times for table in strikes for times in table["exact"]]
    part["exact onsets of " + ", ".join(PERCUSSIVE)] = {
        way: kept(exact, group_onsets(strikes, way)) for way in strikes[0]["ways"]
    }
    store.write()
    for name in ("all", "procedural", "bounce", "dance"):
        for way in ways:
            print(name, way, json.dumps(part[name][way]), flush=True)
    print(json.dumps(part["exact onsets of " + ", ".join(PERCUSSIVE)]), part["silence, peak"])


def real(args) -> None:
    "Recordings, file by file: numbers and names only."
    if not args.recordings.is_dir():
        print(f"{args.recordings} is not at hand: nothing to measure")
        return
    vocoder = load_vocoder(args.model)
    ways, store = speakers(vocoder), Store(args.out, fingerprint(args.model))
    part, spec = store.section("real"), replace(vocoder.spec, frame_size=8)
    part["about"] |= {"first seconds": 20}
    files = part.setdefault("files", {})
    for path in sorted(p for p in args.recordings.iterdir() if p.name not in files):
        try:
            wave = read_media(path, spec=spec).waveform[None, : 20 * spec.sample_rate]
        except (MediaError, TypeError) as error:
            files[path.name] = {"refused": str(error).replace(str(path), path.name)}
            continue
        true = whole_columns(wave, spec)
        mel, made = log_mel(true, spec), {}
        for way, speak in ways.items():

            def row():
                values = zip(MEASURES, errors(speak(mel), true, spec)[0].tolist())
                return {m: None if math.isnan(x) else round(x, 4) for m, x in values}

            made[way] = cached(f"real, {path.stem}", way, store.weights, row)
        files[path.name] = {"seconds": round(true.shape[1] / spec.sample_rate, 2)} | made
        store.write()
        print(path.name, json.dumps(files[path.name]), flush=True)
    heard = [f for f in files.values() if f.get(RIVAL, {}).get("mel loud") is not None]
    part["mean of those that are not silent"] = {"files": len(heard)} | {
        way: {m: round(float(np.mean([f[way][m] for f in heard])), 4) for m in MEASURES}
        for way in ways
    }
    part["files where ours is closer"] = {
        m: sum(f[SHIPPED][m] < f[RIVAL][m] for f in heard) for m in MEASURES
    }
    store.write()
    print(json.dumps(part["mean of those that are not silent"]), part["files where ours is closer"])


FFT_FLOPS = 5 * 512 * math.log2(512)  # 5 N log2 N: a complex one; a real one can do with half


def networks(vocoder: Vocoder) -> dict[str, Vocoder]:
    "The shipped one folded with and without `match_mel`, unfolded, and the paper's sizes."
    free = MelGANGenerator(**{k: v for k, v in vocoder.model.config.items() if k[0] != "_"})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        paper = MelGANGenerator.paper().start_silent().fold()
    return {
        SHIPPED: vocoder,
        f"{SHIPPED}, no match": Vocoder(vocoder.model, rounds=0),
        f"{SHIPPED}, no match, weight norm not folded": Vocoder(free, rounds=0),
        "paper's sizes, untrained, no match": Vocoder(paper, rounds=0),
    }


def transforms(way: str, vocoder: Vocoder | None) -> int:
    "FFTs for one mel column: there and back in each round, and the last way back of phases."
    if vocoder is None:
        return 2 * 32 + 1
    draws = vocoder.model.config.stft_hop > 1
    settle = (2 * vocoder.settle + 1) * vocoder.model.places * draws
    return settle + 2 * vocoder.rounds


def speed(args) -> None:
    "CPU and wall time of each way, in turn, so that a busy machine slows all of them alike."
    vocoder, seconds = load_vocoder(args.model), 8.192
    store, spec = Store(args.out, fingerprint(args.model)), vocoder.spec
    mel = log_mel(make_sounds(1, duration=seconds, seed=SEED).waveform, spec)
    nets = networks(vocoder)
    ways = {name: lambda mel, v=v: v(mel, spec) for name, v in nets.items()}
    ways[RIVAL] = speakers(vocoder)[RIVAL]
    part = store.section("speed")
    part["about"] |= {"seconds of sound": seconds, "times": "median of 5 after one to warm up"}
    took = {name: ([], []) for name in ways}
    for _ in range(6):
        for name, speak in ways.items():
            began = time.perf_counter(), time.process_time()
            speak(mel)
            took[name][0].append(time.perf_counter() - began[0])
            took[name][1].append(time.process_time() - began[1])
    for name, speak in ways.items():
        with FlopCounterMode(display=False) as counter:
            speak(mel)
        fft = transforms(name, nets.get(name)) * FFT_FLOPS * spec.mel_rate
        wall, cpu = (statistics.median(x[1:]) / seconds for x in took[name])
        part[name] = {"real-time factor, CPU time": round(cpu, 4)}
        part[name] |= {"real-time factor, wall": round(wall, 4)}
        counted = counter.get_total_flops() / seconds
        part[name] |= {"GFLOP per s of sound": round((counted + fft) / 1e9, 3)}
        part[name] |= {"of which FFT": round(fft / 1e9, 3)}
    lim = part[RIVAL]["real-time factor, CPU time"]
    part[f"{SHIPPED} over {RIVAL}, CPU time"] = round(
        part[SHIPPED]["real-time factor, CPU time"] / lim, 3
    )
    store.write()
    part["memory"] = {way: child_memory(args.model, way) for way in ("nothing", "stream", "pass")}
    store.write()
    print(json.dumps(part, indent=1))


def child_memory(model: str, way: str) -> dict:
    "Peak memory of a process that does one thing."
    command = [sys.executable, __file__, "memory", "--model", model, "--way", way]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def resident(field: str) -> int:
    "This process's VmRSS (now) or VmHWM (peak) in MB, as Linux counts them."
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field))) // 1024


def forget_peak() -> int:
    "Sets the peak to what is in use now, which imports and loading had exceeded; that in MB."
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def memory(args) -> None:
    "Run by `speed`: 10 minutes in chunks of 2,048 columns, or 1 minute in one pass; or nothing."
    vocoder = load_vocoder(args.model)
    mel = log_mel(make_sounds(1, duration=8.192, seed=SEED).waveform, vocoder.spec)
    minutes = {"nothing": 0, "stream": 10, "pass": 1}[args.way]
    n_columns = round(minutes * 60 * vocoder.spec.mel_rate)
    before, heard = forget_peak(), 0
    if args.way == "stream":
        pieces = (mel[..., : min(512, n_columns - i)] for i in range(0, n_columns, 512))
        for piece in vocoder.stream(pieces):
            heard += piece.shape[-1]
    elif args.way == "pass":
        heard = vocoder.render(mel.repeat(1, 1, 8)[..., :n_columns]).shape[-1]
    found = {"minutes": round(heard / vocoder.spec.sample_rate / 60, 3)}
    print(json.dumps(found | {"before MB": before, "peak MB": resident("VmHWM")}))


def made_mels(test: TestSet, model) -> tuple[Tensor, Tensor]:
    "Generated and true log-mels (n, n_mels, t) in decades; the first kept in runs/."
    path, scale = RUNS / "generated.safetensors", (model.config.mel_mean, model.config.mel_std)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        made, _ = test.sample(model, "v2a", steps=25, weight=2.0, solver=FRESH)
        save_file({"mel": denormalise_mel(made, *scale).contiguous()}, path)
    return load_file(path)["mel"], denormalise_mel(test.data.audio, *scale)


def generated(args) -> None:
    "Round trips of generated mels, as `cmmd sample` makes them with 25 steps, and of true ones."
    vocoder, model = load_vocoder(args.model), load_model("toy-bounce")
    test = TestSet("bounce", 24, vae=load_vae("tiny"), model=model)
    store, spec = Store(args.out, fingerprint(args.model)), test.spec
    part, floor = store.section("generated"), math.log10(spec.mel_floor)
    part["about"] |= {"clips": 24, "model": "toy-bounce", "sample_steps": 25, "guidance": 2.0}
    mels = dict(zip(("generated", "true"), made_mels(test, model)))
    for kind, mel in mels.items():
        mel = mel.clamp(min=floor)  # what lies below the floor cannot be heard
        heard = {"the mel itself": [detect_onsets(m, spec) for m in mel]}
        loud, part[kind] = mel > -3, {}
        for way, speak in speakers(vocoder).items():

            def row():
                wave = torch.cat([speak(some) for some in mel.split(8)])
                apart = (log_mel(wave, spec) - mel).abs()
                over = (apart * loud).sum((1, 2)) / loud.sum((1, 2))
                times = [detect_onsets_waveform(w, spec).tolist() for w in wave]
                return {"all": apart.mean((1, 2)).tolist(), "loud": over.tolist(), "onsets": times}

            found = cached(f"generated, {kind} mels", way, store.weights, row)
            part[kind][way] = {"round trip": interval(np.array(found["all"]))}
            part[kind][way]["round trip, cells above -3"] = interval(np.array(found["loud"]))
            heard[way] = found["onsets"]
        for way, found in heard.items():
            part[kind].setdefault(way, {})["v2a F1"] = score(test.events, found)
        store.write()
        for way, found in part[kind].items():
            print(kind, way, json.dumps(found), flush=True)


LAB_STEPS, LAB_SAMPLES = 200, 65_536  # steps of a run; samples of a step
LAB_ARMS = {  # name -> samples of a crop, weight of the mel loss; the first are the paper's
    "sequence 65536, mel weight 10": (65_536, 10.0),
    "sequence 8192, mel weight 10": (8_192, 10.0),
    "sequence 65536, mel weight 2": (65_536, 2.0),
    "sequence 65536, mel weight 45": (65_536, 45.0),
}


def lab_networks(seed: int) -> tuple[MelGANGenerator, MelGANDiscriminator]:
    "Very small ones, the same first weights for every arm of a seed."
    torch.manual_seed(seed)
    generator = MelGANGenerator(ratios=(8, 8, 4), ngf=8).start_silent()
    return generator, MelGANDiscriminator(ndf=4, max_channels=64)


@torch.no_grad()
def lab_errors(made: Tensor, true: Tensor, spec: ClipSpec) -> dict[str, float]:
    means = errors(made, true, spec).nanmean(0).tolist()
    return {m: round(x, 4) for m, x in zip(MEASURES, means)}


def lab_run(arm: str, seed: int, bank, true: Tensor) -> dict:
    "One arm from scratch with the paper's losses, judged after every 100 steps."
    sequence, mel_weight = LAB_ARMS[arm]
    generator, discriminator = lab_networks(seed)
    spec, history, began = generator.spec, [], time.process_time()

    def judge(metrics: dict) -> None:
        with torch.no_grad():
            made = torch.cat([generator(mel) for mel in log_mel(true, spec).split(4)])
        losses = {k: round(v, 4) for k, v in metrics.items() if k.startswith("loss_")}
        history.append({"step": metrics["step"]} | lab_errors(made, true, spec) | losses)
        print(arm, seed, history[-1], flush=True)

    config = VocoderConfig(
        steps=LAB_STEPS,
        batch_size=LAB_SAMPLES // sequence,
        sequence=sequence,
        mel_weight=mel_weight,
        learning_rate=2e-3,
        filter_probability=0.0,
        log_every=100,
        seed=seed,
        **{k: 0.0 for k in ("stft_weight", "matched_weight") if hasattr(VocoderConfig, k)},
    )
    done = train_vocoder(generator, bank, discriminator=discriminator, config=config, on_log=judge)
    if done.stopped:  # a signal
        raise SystemExit(130)
    run = {"arm": arm, "seed": seed, "steps": LAB_STEPS, "batch": config.batch_size}
    return run | {"cpu_s": round(time.process_time() - began, 1), "history": history}


def lab(args) -> None:
    "Sequence length and mel weight, seed by seed; short runs show how training begins, no more."
    results, bank = Results(args.lab_out), toy_sounds(64)
    generator, _ = lab_networks(0)
    spec = generator.spec
    true = whole_columns(toy_sounds(16, seed=SEED).samples.view(16, -1), spec)
    lim = griffin_lim(log_mel(true, spec), spec, generator=make_generator(0, "vocoder"))
    lines = {"silence": torch.zeros_like(true), RIVAL: lim}
    lines["true sound, 8 ms late"] = late(true)
    results.about |= about_machine() | {
        "lines": {name: lab_errors(wave, true, spec) for name, wave in lines.items()},
        "train_sounds": len(bank),
        "test_sounds": len(true),
        "samples_per_step": LAB_SAMPLES,
        "generator": sum(p.numel() for p in generator.parameters()),
        "learning_rate": 2e-3,
    }
    for seed in args.seeds:
        for arm in LAB_ARMS:
            if not results.has(arm=arm, seed=seed):
                results.add(lab_run(arm, seed, bank, true))


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("what", choices=("quality", "real", "speed", "generated", "lab", "memory"))
    p.add_argument("--model", default="tiny-vocoder")
    p.add_argument("--recordings", type=Path, default=Path("../shared/real/audio"))
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the lab")
    p.add_argument("--way", choices=("nothing", "stream", "pass"), help="of memory")
    p.add_argument("--out", type=Path, default=Path("benchmarks/vocoder.json"))
    p.add_argument("--lab-out", type=Path, default=Path("benchmarks/labs/vocoder.json"))
    args = p.parse_args()
    torch.set_num_threads(1)
    jobs = {"quality": quality, "real": real, "speed": speed, "generated": generated, "lab": lab}
    jobs["memory"] = memory
    jobs[args.what](args)


if __name__ == "__main__":
    main()
