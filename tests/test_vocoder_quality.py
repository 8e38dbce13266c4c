"""The shipped vocoder measured small: 12 unseen sounds beside Griffin-Lim.

The full measure is `benchmarks/vocoder.py`. The aim is 0.75 of Griffin-Lim's errors and 95% of the
onsets, over many sounds.
"""

import importlib.util
import json
import math
from dataclasses import replace

import pytest
import torch
from project import ROOT
from safetensors import safe_open

from cmmd.core import ClipSpec, data_path, make_generator
from cmmd.mel import griffin_lim, log_mel
from cmmd.melgan import load_vocoder, stft_errors
from cmmd.sounds import SOUND_KINDS, make_sounds
from cmmd.sync import event_scores
from cmmd.toy import make_clips

FOLDER, SEED = data_path("weights", "tiny-vocoder"), 1  # it was trained on sounds of seed 0
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="no vocoder is shipped here")


def onset_times(wave: torch.Tensor) -> list:
    "Of a waveform, by the detector that the benchmark uses."
    path = ROOT / "benchmarks" / "onsets.py"
    spec = importlib.util.spec_from_file_location("onsets", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.onset_times(wave, 16_000)


@pytest.fixture(scope="module")
def vocoder():
    return load_vocoder("tiny-vocoder")


@pytest.fixture(scope="module")
def sounds(vocoder):
    "True sounds, what the vocoder makes of their mels, and what Griffin-Lim does: (12, samples)."
    spec = replace(ClipSpec.toy(n_frames=30), frame_size=8)
    made = [
        make_sounds(1, duration=spec.duration, seed=SEED, start=start, kinds=(kind,)).waveform
        for start, kind in enumerate((*SOUND_KINDS, "bar", "drum"), start=108)
    ]
    clips = make_clips(4, spec=spec, seed=SEED, kind="bounce").waveform
    true = torch.cat([*made, clips])[:, : 180 * 256]
    mel = log_mel(true, vocoder.spec)
    rival = griffin_lim(mel, vocoder.spec, generator=make_generator(0, "vocoder"), n_iter=32)
    return true, vocoder(mel, vocoder.spec), rival


def stft_error(made, true) -> float:
    return float(sum(stft_errors(made, true)).mean())


def mel_error(made, true, spec) -> float:
    return float((log_mel(made, spec) - log_mel(true, spec)).abs().mean())


def test_spectra_are_a_quarter_closer_than_griffin_lim(sounds):
    true, *made = sounds
    ours, rival = (stft_error(wave, true) for wave in made)
    assert ours < 0.8 * rival


def test_mels_are_a_quarter_closer_than_griffin_lim(vocoder, sounds):
    true, *made = sounds
    ours, rival = (mel_error(wave, true, vocoder.spec) for wave in made)
    assert ours < 0.75 * rival


def test_onsets_are_kept(sounds):
    "Within 10 ms; and not those of another sound."
    true, ours, _ = sounds
    heard, made = ([onset_times(w) for w in waves] for waves in (true, ours))
    found = event_scores(heard, made, tolerance=0.010)
    assert found.n_true > 40 and found.recall >= 0.93
    assert event_scores(heard[1:] + heard[:1], made, tolerance=0.010).recall < 0.3


def test_silence_stays_silent(vocoder):
    spec = vocoder.spec
    floor = torch.full((1, spec.n_mels, 64), math.log10(spec.mel_floor))
    for mel in (floor, log_mel(torch.zeros(1, 64 * spec.hop_length), spec)):
        peak = float(vocoder(mel, spec).abs().max())
        assert peak < 1e-3


@pytest.mark.parametrize("chunk", [48, 128, 512])
def test_a_stream_is_the_sound_in_one_pass(vocoder, sounds, chunk):
    "Pieces of uneven sizes, chunks of any: the same samples to 1e-5, over 12 s of 4 sounds."
    mel = log_mel(sounds[0][:4].reshape(1, -1), vocoder.spec)
    whole, usual = vocoder.render(mel), vocoder.chunk
    vocoder.chunk = chunk
    made = torch.cat(list(vocoder.stream(mel.split([1, 100, 7, 612], -1))), -1)
    vocoder.chunk = usual
    assert made.shape == whole.shape == (1, 720 * 256)
    apart = float((made - whole).abs().max())
    assert apart < 1e-5


def test_a_steady_tone_keeps_its_pitch(vocoder):
    "To 1.5%; a convolutional generator of samples can only answer with multiples of 62.5 Hz."
    spec, time = vocoder.spec, torch.arange(120 * 256) / 16_000
    for hertz in (437.0, 1030.0, 2218.0):
        tone = 0.5 * torch.sin(2 * torch.pi * hertz * time)
        made = vocoder(log_mel(tone, spec), spec)[20 * 256 : 100 * 256] * torch.hann_window(20_480)
        strongest = float(torch.fft.rfft(made).abs().argmax()) * 16_000 / len(made)
        assert abs(strongest - hertz) < max(10, 0.015 * hertz)


def test_the_file_is_small_and_half_precision():
    file = FOLDER / "diffusion_pytorch_model.safetensors"
    assert file.stat().st_size <= 5_000_000
    with safe_open(file, "pt") as weights:
        assert {weights.get_tensor(k).dtype for k in weights.keys()} == {torch.float16}
    assert json.loads((FOLDER / "config.json").read_text())["_class_name"] == "MelGANGenerator"
