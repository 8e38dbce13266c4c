"""A tiny training and all three kinds of sampling, through the installed command."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cmmd.core import ClipSpec
from cmmd.demo import DEMO_FILES, run_demo
from cmmd.media import probe, read_media, write_clip, write_wav
from cmmd.pipeline import check_out_folder, load_model
from cmmd.toy import make_clips

CLIP = ClipSpec.toy()


SMALL = "--config tiny --n-clips 8 --batch-size 2 --save-every 2 --seed 3 --n-show 0".split()


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("end to end")  # a space in the name


def cmmd(place: Path, *arguments) -> str:
    "What the command printed; its errors when it fails."
    command = [
        Path(sys.executable).parent / "cmmd",
        *map(str, arguments),
        "--device",
        "cpu",
        "--threads",
        "1",
    ]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Warning" not in done.stderr and "Traceback" not in done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def run(place) -> Path:
    "A run of four steps, stopped after two and resumed."
    assert "4 steps" in cmmd(place, "train", "--out", "run", "--steps", "4", *SMALL)
    return place / "run"


def test_the_run_leaves_a_model(run):
    assert load_model(run).config.vae == "tiny"
    assert json.loads((run / "model" / "training.json").read_text())["steps"] == 4
    assert {p.name for p in run.glob("step_*")} == {"step_00000002", "step_00000004"}


def test_a_finished_run_can_be_resumed_and_replaced(run, place):
    before = (run / "model" / "diffusion_pytorch_model.safetensors").read_bytes()
    cmmd(place, "train", "--out", "run", "--steps", "4", "--resume", *SMALL)
    assert (run / "model" / "diffusion_pytorch_model.safetensors").read_bytes() == before
    cmmd(place, "train", "--out", "run", "--steps", "4", "--overwrite", *SMALL)
    assert (run / "model" / "diffusion_pytorch_model.safetensors").read_bytes() == before, (
        "same seed, same model"
    )


def test_contrastive_training_goes_on_from_a_run(run, place):
    more = "--start-from run --steps 2 --n-clips 8 --batch-size 2 --n-show 0".split()
    term = ("--contrast-weight", "0.01", "--negatives", "mixture", "--contrast-bound", "1")
    cmmd(place, "train", "--out", "contrast", *more, *term)
    record = json.loads((place / "contrast" / "model" / "training.json").read_text())
    assert record["loss"].startswith("contrastive_loss(ContrastiveConfig(weight=0.01")
    metrics = json.loads((place / "contrast" / "metrics.jsonl").read_text().splitlines()[-1])
    assert metrics["loss"] < metrics["loss_video"] + metrics["loss_audio"]
    assert metrics["loss_negative"] > 0


def test_a_vocoder_is_trained_resumed_and_heard(place):
    few = "--steps 4 --save-every 2 --n-sounds 8 --sequence 2048 --batch-size 2".split()
    assert "4 steps" in cmmd(place, "train-vocoder", "--out", "voice", *few)
    weights = place / "voice" / "model" / "diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    for lost in ("model", "step_00000004"):
        shutil.rmtree(place / "voice" / lost)
    said = cmmd(place, "train-vocoder", "--out", "voice", "--resume", *few)
    assert said.startswith("voice/model: 4 steps") and "log-mel L1" in said
    assert weights.read_bytes() == before, "resumed bit for bit"
    wave = make_clips(1, spec=CLIP.with_frames(33), seed=6).waveform[0, :52_799]
    write_wav(place / "voice-in.wav", wave, spec=CLIP)
    said = cmmd(place, "vocode", "voice-in.wav", "out.wav", "--vocoder", "voice")
    assert said.startswith("out.wav: 3.30 s, log-mel L1 ")
    fine = replace(CLIP, fps=CLIP.sample_rate, frame_size=8)
    assert read_media(place / "out.wav", spec=fine).waveform.shape == wave.shape


def test_video_to_sound(run, place):
    clips = make_clips(1, spec=CLIP.with_frames(25), seed=5)
    write_clip(place / "in.mp4", clips.video[0], None, spec=CLIP)
    cmmd(
        place, "sample", "--video", "in.mp4", "--out", "sound.mp4", "--model", "run", "--steps", "2"
    )
    before, after = (
        read_media(place / "in.mp4", spec=CLIP),
        read_media(place / "sound.mp4", spec=CLIP),
    )
    assert np.array_equal(before.video, after.video), "the picture is the very same"
    info = probe(place / "sound.mp4")
    assert abs(info.audio.duration - 2.5) < 1e-3 and abs(info.video.duration - 2.5) < 1e-3
    assert 0 < float(after.waveform.abs().max()) <= 1.01


def test_sound_to_video(run, place):
    wave = make_clips(1, spec=CLIP.with_frames(25), seed=6).waveform[0, :33_333]
    write_wav(place / "in.wav", wave, spec=CLIP)
    cmmd(
        place,
        "sample",
        "--audio",
        "in.wav",
        "--out",
        "picture.mp4",
        "--model",
        "run",
        "--steps",
        "2",
    )
    info = probe(place / "picture.mp4")
    assert (
        0 <= info.video.duration - 33_333 / 16_000 <= 0.02
        and min(info.video.width, info.video.height) >= 256
    )
    heard = read_media(place / "picture.mp4", spec=CLIP).waveform[:33_333]
    assert float((heard - wave).square().mean() / wave.square().mean()) < 0.2, "the sound is kept"


def test_both(run, place):
    cmmd(
        place,
        "sample",
        "--seconds",
        "1.2",
        "--out",
        "both.mp4",
        "--model",
        "run",
        "--steps",
        "2",
        "--seed",
        "1",
    )
    cmmd(
        place,
        "sample",
        "--seconds",
        "1.2",
        "--out",
        "again.mp4",
        "--model",
        "run",
        "--steps",
        "2",
        "--seed",
        "1",
    )
    assert abs(probe(place / "both.mp4").video.duration - 1.2) < 1e-3
    assert (place / "both.mp4").read_bytes() == (place / "again.mp4").read_bytes(), (
        "same seed, same file"
    )
    few = ("--seconds", "1.2", "--model", "run", "--steps", "2", "--seed", "1")
    cmmd(place, "sample", "--out", "other.mp4", *few, "--vocoder", "griffin-lim")
    one, other = (read_media(place / f"{name}.mp4", spec=CLIP) for name in ("both", "other"))
    assert np.array_equal(one.video, other.video), "a vocoder leaves the picture alone"
    assert one.waveform.shape == other.waveform.shape
    assert not np.array_equal(one.waveform, other.waveform)


def test_demo(run, place):
    small = {
        "steps": 2,
        "n_train": 4,
        "n_eval": 2,
        "n_eval_picture": 2,
        "n_joint": 2,
        "n_show": 1,
        "num_sample_steps": 2,
    }
    demo = run_demo(place / "demo", progress=False, device="cpu", model=str(run), **small)
    check_out_folder(place / "demo", DEMO_FILES, overwrite=True)
    text = (demo.folder / "index.html").read_text()
    assert "://" not in text.replace("http://www.w3.org", ""), "nothing is fetched from anywhere"
    for part in text.split('src="')[1:]:
        assert (demo.folder / part.split('"')[0]).is_file()
    metrics = json.loads((demo.folder / "metrics.json").read_text())
    for name in ("sound, fresh model", "sound, shipped model"):
        assert {name, f"{name}, as heard", f"{name}, by Griffin-Lim"} <= set(metrics["scores"])
    assert metrics["config"]["vocoder"] == "tiny-vocoder" and "tiny-vocoder" in text
    for scored in metrics["scores"].values():
        for key in ("at_100_ms", "at_50_ms"):
            assert {"f1", "chance_f1", "ceiling_f1", "interval_95", "tolerance_s"} <= set(
                scored[key]
            )
    assert (
        metrics["config"]["seed"] == 0
        and metrics["versions"]["torch"]
        and "chance" in demo.summary()
    )
