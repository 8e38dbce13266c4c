"""The shipped checkpoint keeps its promises, measured small: 24 unseen clips, few steps.

The full measure is `benchmarks/shipped.py`.
"""

import json

import pytest
import torch

from cmmd.core import data_path, make_generator
from cmmd.datasets import toy_dataset
from cmmd.guidance import DDIM, generate
from cmmd.joint import loss_gap
from cmmd.latents import decode_video, load_vae
from cmmd.mel import denormalise_mel
from cmmd.pipeline import load_model
from cmmd.sync import detect_impacts, detect_onsets, event_scores
from cmmd.toy import make_clips

N, SEED = 24, 77
FRESH = DDIM(noise_direction="fresh")


@pytest.fixture(scope="module")
def world():
    model, vae = load_model("toy-bounce"), load_vae("tiny")
    spec, mel = model.config.clip, (model.config.mel_mean, model.config.mel_std)
    return (
        model,
        vae,
        toy_dataset(N, vae, spec=spec, seed=SEED, mel=mel),
        make_clips(N, spec=spec, seed=SEED).events,
    )


def onsets(model, audio):
    mels = denormalise_mel(audio, model.config.mel_mean, model.config.mel_std)
    return [detect_onsets(mel, model.config.clip) for mel in mels]


def test_video_to_audio_keeps_time(world):
    model, vae, data, events = world
    made = generate(
        model, video=data.video, num_sample_steps=25, solver=FRESH, generator=make_generator(0)
    )
    assert event_scores(events, onsets(model, made.audio), tolerance=0.1).f1 > 0.85
    assert event_scores(events[1:] + events[:1], onsets(model, made.audio), tolerance=0.1).f1 < 0.5


def test_audio_to_video_keeps_time(world):
    model, vae, data, events = world
    made = generate(
        model,
        audio=data.audio,
        guidance_weight=0.2,
        num_sample_steps=25,
        solver=FRESH,
        generator=make_generator(0),
    )
    found = [detect_impacts(v, model.config.clip) for v in decode_video(vae, made.video)]
    assert event_scores(events, found, tolerance=0.1).f1 > 0.65


def test_the_sound_leans_on_the_picture(world):
    model, vae, data, events = world
    assert loss_gap(model, data.video, audio=data.audio, t=700)["audio"] > 2


def test_weight_folders_have_cards_and_no_pickle():
    for folder in filter(lambda p: p.is_dir(), data_path("weights").iterdir()):
        names = {p.name for p in folder.rglob("*")}
        assert (folder / "README.md").is_file() and "config.json" in names
        assert any(n.endswith(".safetensors") for n in names)
        assert not any(n.endswith((".bin", ".pt", ".pkl", ".ckpt", ".py")) for n in names)
        for config in folder.rglob("*.json"):
            json.loads(config.read_text())


def test_finite_weights(world):
    assert all(torch.isfinite(p).all() for p in world[0].parameters())


def test_the_contrastive_model_beats_its_control(world):
    "The same start and further steps; the paper's sampler, without guidance."
    _, _, data, events = world
    f1 = {}
    for name in ("toy-ncmmd", "toy-cmmd"):
        model = load_model(name)
        made = generate(
            model, video=data.video, num_sample_steps=25, generator=make_generator(0, "v2a")
        )
        f1[name] = event_scores(events, onsets(model, made.audio), tolerance=0.1).f1
    assert f1["toy-cmmd"] > max(0.85, f1["toy-ncmmd"])
