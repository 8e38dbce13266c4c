"""`cmmd sample --video` on videos of strangers: a sound of the exact length, or one clear line."""

import os
from pathlib import Path

import pytest

from cmmd.core import ClipSpec
from cmmd.media import probe, read_media
from cmmd.pipeline import load_model, new_model, sample_file
from cmmd.unet import UNetConfig

HERE = Path(__file__).resolve().parent.parent
FOLDER = Path(os.environ.get("CMMD_REAL_DATA", HERE.parent / "shared" / "real"))
VIDEOS = sorted((FOLDER / "video").glob("*")) if (FOLDER / "video").is_dir() else []
SOUNDS = sorted((FOLDER / "audio").glob("*")) if (FOLDER / "audio").is_dir() else []
QUICK = [
    p
    for p in VIDEOS
    if p.name
    in ("park_10fps_portrait_short.mp4", "fire_vfr_rotated180.mp4", "no_audio_h265_10fps.mp4")
]
pytestmark = pytest.mark.skipif(not VIDEOS, reason="no real videos beside the checkout")
few = dict(num_sample_steps=2, guidance_weight=0.0, device="cpu")


@pytest.fixture(scope="module")
def model():
    return new_model(UNetConfig.tiny(vae="tiny")).eval().requires_grad_(False)


def check_soundtrack(path: Path, out: Path) -> None:
    "As long as the input's video, in both streams, with the picture's size and frames."
    clip = ClipSpec.toy()
    before, after, media = probe(path).video, probe(out), read_media(path, spec=clip)
    assert after.audio is not None and after.video is not None
    assert abs(after.video.start + after.video.duration - media.duration) < 0.06, (
        "as long as the picture"
    )
    assert abs(after.audio.duration - media.duration) < 0.06, "and the sound as well"
    assert {after.video.width, after.video.height} == {
        before.width,
        before.height,
    } or before.codec != "h264"
    assert abs(len(read_media(out, spec=clip).video) - len(media.video)) <= 1


@pytest.mark.parametrize("path", QUICK, ids=lambda p: p.stem)
def test_a_soundtrack_for_some(path, model, tmp_path):
    sample_file(tmp_path / "out.mp4", video=path, model=model, **few)
    check_soundtrack(path, tmp_path / "out.mp4")


@pytest.mark.slow
@pytest.mark.parametrize("path", VIDEOS, ids=lambda p: p.stem)
def test_a_soundtrack_for_all(path, tmp_path):
    sample_file(tmp_path / "out.mp4", video=path, model=load_model("toy-bounce"), **few)
    check_soundtrack(path, tmp_path / "out.mp4")


@pytest.mark.slow
@pytest.mark.parametrize("path", SOUNDS, ids=lambda p: p.stem)
def test_a_picture_for_all(path, model, tmp_path):
    made = sample_file(tmp_path / "out.mp4", audio=path, model=model, **few)
    after, media = probe(tmp_path / "out.mp4"), read_media(path, spec=ClipSpec.toy())
    assert 0 <= made.duration - media.duration <= 0.021
    assert (
        abs(after.video.duration - made.duration) < 1e-3
        and abs(after.audio.duration - made.duration) < 0.03
    )
