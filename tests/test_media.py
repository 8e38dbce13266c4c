"""Media: real files, made files whose truth is known, hostile files, writing, muxing, joining."""

import csv
import os
import random
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from cmmd import media
from cmmd.core import ClipSpec
from cmmd.media import (
    MediaError,
    MediaLimits,
    crossfade,
    frame_window,
    linear_fade,
    mux_audio,
    power_fade,
    probe,
    read_clip,
    read_media,
    windows,
    write_clip,
    write_wav,
)
from cmmd.toy import make_clips

REAL = Path(__file__).resolve().parents[2] / "shared" / "real"
SPEC = ClipSpec.toy()
there = (REAL / "manifest.csv").is_file()
real = pytest.mark.skipif(not there, reason="no real media beside the checkout")


def rows(kind: str) -> list[dict]:
    if not there:
        return []
    with open(REAL / "manifest.csv", newline="") as f:
        return [row for row in csv.DictReader(f) if row["kind"] == kind]


def make(
    path,
    n=18,
    *,
    fps=10,
    size=64,
    sound=(1, 16_000),
    seconds=None,
    codec="libx264",
    times=None,
    rotation=0,
    b_frames=0,
):
    "A small file: frame i of grey level 10 + 12 i at `times`, a 440 Hz tone of level 0.3."
    times = [Fraction(i, fps) for i in range(n)] if times is None else times
    with av.open(str(path), "w") as box:
        if n:
            options = {"bf": str(b_frames)} if codec == "libx264" else {}
            video = box.add_stream(codec, rate=fps, options=options)
            video.width = video.height = size
            video.pix_fmt, video.codec_context.time_base = "yuv420p", Fraction(1, 1000)
            if rotation:
                video.set_display_rotation(rotation)
        if sound:
            layout = {1: "mono", 2: "stereo", 6: "5.1"}[sound[0]]
            audio = box.add_stream("aac", rate=sound[1], layout=layout)
        for i in range(n):
            picture = np.full((size, size, 3), min(255, 10 + 12 * i), np.uint8)
            picture[: size // 4, : size // 4] = 255  # a corner that shows rotation
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = round(times[i] * 1000), Fraction(1, 1000)
            box.mux(video.encode(frame))
        if n:
            box.mux(video.encode(None))
        if sound:
            t = np.arange(round((seconds or n / fps) * sound[1])) / sound[1]
            wave = np.tile(0.3 * np.sin(2 * np.pi * 440 * t), (sound[0], 1)).astype(np.float32)
            frame = av.AudioFrame.from_ndarray(wave, "fltp", layout)
            frame.sample_rate, frame.pts, frame.time_base = sound[1], 0, Fraction(1, sound[1])
            box.mux(audio.encode(frame))
            box.mux(audio.encode(None))
    return Path(path)


def one_line(error) -> str:
    text = str(error.value)
    assert len(text.splitlines()) == 1 and len(text) < 500
    return text


def refused(path, text=None, **options) -> None:
    with pytest.raises(MediaError, match=text) as error:
        read_clip(path, spec=SPEC, **options)
    assert Path(path).name in one_line(error)


def levels(video) -> np.ndarray:  # the number of the source frame that each frame shows
    return ((video[:, 40:, 40:].float().mean((1, 2, 3)) - 10) / 12).numpy()


# ---- real files
@real
@pytest.mark.parametrize("row", rows("video") + rows("audio"), ids=lambda r: Path(r["file"]).name)
def test_real_file_gives_exact_clip(row):
    clip = read_clip(REAL / row["file"], spec=SPEC)
    has_video, has_sound = row["kind"] == "video", bool(row["a_codec"])
    assert (clip.video is not None) == has_video and (clip.waveform is not None) == has_sound
    if has_video:
        assert clip.video.shape == (18, 64, 64, 3) and clip.video.dtype == torch.uint8
        assert clip.rotation == abs(int(float(row["rotation"]))) % 360
        size = clip.info.video.width, clip.info.video.height
        assert size == (int(row["width"]), int(row["height"]))
    if has_sound:
        assert clip.waveform.shape == (28_800,) and torch.isfinite(clip.waveform).all()


@real
@pytest.mark.slow
@pytest.mark.parametrize("row", rows("video"), ids=lambda r: Path(r["file"]).name)
def test_whole_real_file_is_as_long_as_a_full_decode(row):
    clip = read_media(REAL / row["file"], spec=SPEC)
    assert abs(clip.duration - (float(row["v_end"]))) < 0.011
    assert len(clip.video) == int(np.ceil(clip.duration * 10 - 0.01))
    if clip.waveform is not None:
        assert len(clip.waveform) == len(clip.video) * 1600


@real
@pytest.mark.parametrize(
    "name", ["bongo_vgg.mp4", "conga_24p6fps.mp4", "pancake_kitchen.mkv", "vlog_mpeg4_mp3.avi"]
)
def test_seeking_gives_the_same_clip(name):
    path = REAL / "video" / name
    if not path.is_file():
        pytest.skip("not there")
    whole, start = read_media(path, spec=SPEC), 5.3 if "vlog" in name else 6.0
    clip, first = read_clip(path, spec=SPEC, start=start), round(start * 10)
    n = min(18, len(whole.video) - first)
    assert (clip.video[:n] == whole.video[first : first + n]).all()
    heard = n * 1600 - 400  # the resampler's edge at the end of the file
    assert (clip.waveform[:heard] - whole.waveform[first * 1600 :][:heard]).abs().max() < 1e-5


@real
def test_mean_of_channels_matches_the_reference_mel():
    import librosa

    path = REAL / "video" / "hammer_vas00323.mp4"
    wave = read_media(path, spec=ClipSpec.toy(sample_rate=22_050)).waveform.numpy()
    mel = librosa.feature.melspectrogram(
        y=wave, sr=22_050, n_fft=1024, hop_length=256, power=1, n_mels=80, fmin=125, fmax=7600
    )
    ours = np.clip((20 * np.log10(np.maximum(mel, 1e-5)) - 20 + 100) / 100, 0, 1)[:, :860]
    theirs = np.load(REAL / "annotations" / "ref_mel" / "hammer_vas00323_mel.npy")
    assert np.abs(ours - theirs[:, : ours.shape[1]]).mean() < 0.015  # the float downmix gives 0.035


# ---- made files
@pytest.mark.parametrize("fps", [10, 25, 30])
def test_frames_are_chosen_by_time(tmp_path, fps):
    n = 2 * fps
    path = make(tmp_path / "a.mp4", min(n, 20), fps=fps, sound=None)
    shown = levels(read_clip(path, spec=SPEC).video)
    truth = np.minimum(np.floor(np.arange(18) * fps / 10 + 1e-6), min(n, 20) - 1)
    assert np.abs(shown - truth).max() < 0.4


def test_variable_rate(tmp_path):
    times = [Fraction(t, 1000) for t in (0, 40, 80, 120, 700, 740, 780, 1400, 1440, 1700)]
    path = make(tmp_path / "v.mp4", 10, times=times, sound=None)
    shown = levels(read_clip(path, spec=SPEC).video)
    truth = [max(i for i, t in enumerate(times) if t <= Fraction(k, 10)) for k in range(18)]
    assert np.abs(shown - truth).max() < 0.4


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotation_is_applied(tmp_path, rotation):
    clip = read_clip(make(tmp_path / "r.mp4", rotation=rotation, sound=None), spec=SPEC)
    plain = read_clip(make(tmp_path / "p.mp4", sound=None), spec=SPEC)
    assert clip.rotation == rotation
    turned = torch.rot90(plain.video, rotation // 90, (1, 2))
    assert (clip.video.int() - turned.int()).abs().max() <= 2


@pytest.mark.parametrize(
    "channels,rate", [(1, 16_000), (2, 44_100), (2, 48_000), (6, 48_000), (1, 8_000)]
)
def test_mono_is_the_mean_at_any_rate(tmp_path, channels, rate):
    path = make(tmp_path / "s.mp4", sound=(channels, rate))
    wave = read_clip(path, spec=SPEC).waveform[2000:-2000]
    level = 0.25 if channels == 6 else 0.3  # AAC keeps 440 Hz out of the sixth, the bass
    assert abs(wave.square().mean().sqrt() * 2**0.5 - level) < 0.02
    phase = torch.arange(2000, 2000 + len(wave)) / 16_000 * 440 * 2 * torch.pi
    assert abs(float((wave * phase.sin()).mean() * 2) - level) < 0.02  # and in time


def test_short_streams_are_held_and_padded(tmp_path):
    clip = read_clip(make(tmp_path / "s.mp4", 5, seconds=0.5), spec=SPEC)
    assert clip.video.shape[0] == 18 and (clip.video[5:] == clip.video[4]).all()
    assert clip.waveform[:7000].abs().max() > 0.2 and clip.waveform[8000:].abs().max() == 0
    assert abs(clip.duration - 0.5) < 1e-3
    refused(tmp_path / "s.mp4", "past its end", start=0.6)


def test_missing_streams_are_none(tmp_path):
    assert read_clip(make(tmp_path / "v.mp4", sound=None), spec=SPEC).waveform is None
    clip = read_media(make(tmp_path / "a.mp4", 0, seconds=2.0), spec=SPEC)
    assert clip.video is None and clip.waveform.shape == (32_000,)


def test_start_shifts_both(tmp_path):
    path = make(tmp_path / "a.mp4", 20, fps=10)
    clip = read_clip(path, spec=ClipSpec.toy(n_frames=10), start=0.7)
    assert np.abs(levels(clip.video) - np.arange(7, 17)).max() < 0.4
    assert len(clip.waveform) == 16_000
    whole = read_clip(path, spec=SPEC).waveform[11_200:27_200]
    assert (clip.waveform - whole).abs().max() < 1e-5


def test_limits(tmp_path):
    path = make(tmp_path / "a.mp4", 20, fps=10)
    refused(path, "pixels", limits=MediaLimits(max_side=32))
    refused(path, "frames per second", limits=MediaLimits(max_fps=5))
    refused(path, "long", limits=MediaLimits(max_duration=1))
    refused(path, "streams", limits=MediaLimits(max_streams=1))
    with pytest.raises(MediaError, match="read at once"):
        read_media(path, spec=SPEC, limits=MediaLimits(max_read=1))
    with pytest.raises(ValueError, match="max_fps"):
        MediaLimits(max_fps=0)
    with pytest.raises(ValueError, match="start"):
        read_clip(path, spec=SPEC, start=-1)


# ---- hostile files
def test_files_that_are_none(tmp_path):
    files = {"zero.mp4": b"", "text.mp4": b"hello world\n" * 99, "five.wav": b"RIFF\0"}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        refused(tmp_path / name)
    refused(tmp_path, "ordinary")
    refused(tmp_path / "absent.mp4", "No such file")
    (tmp_path / "loop.mp4").symlink_to(tmp_path / "loop.mp4")
    refused(tmp_path / "loop.mp4", "opened")
    os.mkfifo(tmp_path / "pipe.mp4")
    refused(tmp_path / "pipe.mp4", "ordinary")
    refused("https://127.0.0.1:9/a.mp4", "address")
    with pytest.raises(TypeError, match="path"):
        probe(7)


def test_a_name_cannot_break_the_line(tmp_path):
    path = tmp_path / "two\nlines\x1b[31m.mp4"
    path.write_bytes(b"nothing")
    with pytest.raises(MediaError) as error:
        probe(path)
    one_line(error).encode("ascii")
    strange = os.fsencode(tmp_path) + b"/\xff.mp4"
    Path(os.fsdecode(strange)).write_bytes(b"nothing")
    with pytest.raises(MediaError) as error:
        probe(os.fsdecode(strange))
    one_line(error).encode()


def test_no_other_file_and_no_connection(tmp_path):
    "A list that names another file, in every disguise; FFmpeg alone opens the first one."
    other = make(tmp_path / "other.mp4")
    lists = {
        "concat.mp4": "ffconcat version 1.0\nfile other.mp4\n",
        "hls.m3u8": "#EXTM3U\n#EXTINF:1,\nother.mp4\n",
        "url.m3u8": "#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n",
        "sdp.sdp": "v=0\nm=audio 9 RTP/AVP 0\n",
        "dash.mpd": "<MPD><Period><BaseURL>other.mp4</BaseURL></Period></MPD>",
    }
    before = other.stat().st_atime_ns
    for name, text in lists.items():
        (tmp_path / name).write_text(text)
        refused(tmp_path / name)
    assert other.stat().st_atime_ns == before


def test_truncated_files_are_refused(tmp_path):
    whole = make(tmp_path / "a.mp4", 20).read_bytes()
    for share in (0.1, 0.5, 0.9):
        path = tmp_path / f"cut{share}.mp4"
        path.write_bytes(whole[: int(len(whole) * share)])
        refused(path)
    front = tmp_path / "front.mp4"  # index in front: the header is whole
    write_clip(front, *clip_of(SPEC), spec=SPEC)
    data = front.read_bytes()
    for share in (0.3, 0.6, 0.8):
        path = tmp_path / f"front{share}.mp4"
        path.write_bytes(data[: int(len(data) * share)])
        refused(path)


def clip_of(spec, seed=1):
    clips = make_clips(1, spec=spec, seed=seed)
    return clips.video[0], clips.waveform[0]


def mutate(data: bytes, rng: random.Random) -> bytes:
    data = bytearray(data)
    for _ in range(rng.choice((1, 3, 30))):
        i, kind = rng.randrange(len(data)), rng.randrange(4)
        if kind < 2:
            data[i] = rng.randrange(256)
        elif kind == 2:
            del data[i : i + rng.randrange(1, 200)]
        else:
            data[i:i] = data[rng.randrange(len(data)) :][: rng.randrange(1, 200)]
    return bytes(data)


def fuzz(tmp_path, n: int) -> int:
    "Every mutant is refused in one line, in time, or read as long as its header declares."
    write_clip(tmp_path / "good.mp4", *clip_of(SPEC), spec=SPEC)
    data, rng, read = (tmp_path / "good.mp4").read_bytes(), random.Random(0), 0
    for i in range(n):
        path = tmp_path / f"m{i}.mp4"
        path.write_bytes(mutate(data, rng))
        began = time.monotonic()
        try:
            clip = read_media(path, spec=SPEC)
        except MediaError as e:
            assert len(str(e).splitlines()) == 1 and path.name in str(e)
        else:
            read += 1
            if clip.video is not None and clip.info.video.fps:
                video = clip.info.video
                declared = video.start - clip.info.start + (video.duration or clip.duration)
                assert abs(clip.duration - declared) < 0.2
            assert clip.waveform is None or torch.isfinite(clip.waveform).all()
        assert time.monotonic() - began < 20  # 10 s of its own time, on a busy machine
        path.unlink()
    return read


def test_mutated_files(tmp_path):
    fuzz(tmp_path, 20)


@pytest.mark.slow
def test_many_mutated_files(tmp_path):
    assert 5 < fuzz(tmp_path, 200) < 195


def bomb(path, size=64, n=2, step=100, streams=1):
    with av.open(str(path), "w") as box:
        made = []
        for _ in range(streams):
            video = box.add_stream(
                "libx264",
                rate=max(1, 1_000_000 // step),
                options={"preset": "ultrafast", "bf": "0"},
            )
            video.width = video.height = size
            video.pix_fmt, video.codec_context.time_base = "yuv420p", Fraction(1, 1_000_000)
            made.append(video)
        for i in range(n):
            for video in made:
                frame = av.VideoFrame(size, size, "yuv420p")
                for plane in frame.planes:
                    plane.update(bytes(plane.buffer_size))
                frame.pts, frame.time_base = i * step, Fraction(1, 1_000_000)
                box.mux(video.encode(frame))
        for video in made:
            box.mux(video.encode(None))
    return path


@pytest.mark.parametrize(
    "text,name,options",
    [
        ("pixels", "a.mp4", dict(size=8000, step=100_000)),
        ("long", "a.mkv", dict(n=3, step=18_000_000_000)),
        ("frames per second", "a.mp4", dict(n=20, step=1)),
        ("64 streams", "a.mp4", dict(streams=64, step=100_000)),
    ],
)
def test_bombs_are_refused_from_the_header(tmp_path, text, name, options):
    path = bomb(tmp_path / name, **options)
    began = time.monotonic()
    with pytest.raises(MediaError, match=text):
        probe(path)
    assert time.monotonic() - began < 10  # 1 s on an idle machine
    refused(path, text)


@pytest.mark.parametrize(
    "program,text",
    [
        ("import time; time.sleep(60)", "longer than"),
        (
            "import resource as r; r.setrlimit(r.RLIMIT_CPU, (1, 2))\nwhile True: pass",
            "longer than",
        ),
        ("import os; os.abort()", "stopped"),
        ("pass", "stopped"),
        ("import sys; sys.stderr.write('[1, 2]')", "stopped"),
        ('import sys; sys.stderr.write(\'{"error": "a\\nb"}\')', "a"),
    ],
)
def test_whatever_happens_to_the_child(tmp_path, monkeypatch, program, text):
    path = make(tmp_path / "a.mp4", 2)
    monkeypatch.setattr(media, "_child_program", lambda parts: program)
    if "sleep" in program:
        monkeypatch.setattr(media, "GRACE", 0.2)
    with pytest.raises(MediaError, match=text) as error:
        probe(path, limits=MediaLimits(seconds=0.2))
    assert path.name in one_line(error)


def test_memory_is_limited(tmp_path):
    refused(make(tmp_path / "a.mp4"), "memory", limits=MediaLimits(memory=1))


def test_the_child_imports_neither_torch_nor_matplotlib():
    program = media._child_program(tuple(media._CHILD_PARTS.values())).rsplit("\n", 1)[0]
    program += "\nprint([m for m in ('torch', 'matplotlib', 'cmmd') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


# ---- writing
def test_clip_comes_back(tmp_path):
    video, wave = clip_of(SPEC)
    path = write_clip(tmp_path / "a.mp4", video, wave, spec=SPEC)
    info, clip = probe(path), read_media(path, spec=SPEC)
    assert info.video.codec == "h264" and info.audio.codec == "aac"
    assert info.video.n_frames == 18
    assert abs(info.video.duration - 1.8) < 1e-6 and abs(info.audio.duration - 1.8) < 1e-6
    assert clip.video.shape == video.shape and clip.waveform.shape == wave.shape
    assert 10 * torch.log10(255**2 / (clip.video.float() - video.float()).square().mean()) > 30
    lag = np.correlate(clip.waveform.numpy(), wave.numpy(), "full").argmax() - len(wave) + 1
    assert lag == 0
    data = path.read_bytes()
    assert 0 < data.find(b"moov") < data.find(b"mdat")  # faststart
    silent = write_clip(tmp_path / "b.mp4", video, None, spec=SPEC)
    assert probe(silent).audio is None


def test_nothing_is_overwritten_and_nothing_left(tmp_path):
    video, wave = clip_of(SPEC)
    path = write_clip(tmp_path / "a.mp4", video, wave, spec=SPEC)
    before = path.read_bytes()
    for write in (
        lambda: write_clip(path, video, None, spec=SPEC),
        lambda: write_wav(path, wave, spec=SPEC),
        lambda: mux_audio(path, wave, path, spec=SPEC),
    ):
        with pytest.raises(MediaError, match="exists already"):
            write()
    with pytest.raises(ValueError):
        write_clip(path, video, wave * float("nan"), spec=SPEC, overwrite=True)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.mp4"]
    with pytest.raises(MediaError, match="cannot be written"):
        write_wav(tmp_path / "no" / "a.wav", wave, spec=SPEC)
    write_clip(path, video, None, spec=SPEC, overwrite=True)
    assert path.read_bytes() != before and os.listdir(tmp_path) == ["a.mp4"]


def test_wav_is_exact(tmp_path):
    import soundfile

    wave = torch.linspace(-1.5, 1.5, 5000)
    path = write_wav(tmp_path / "a.wav", wave, spec=SPEC)
    theirs, rate = soundfile.read(path, dtype="float32")
    assert rate == 16_000 and (theirs == wave.numpy()).all()
    assert (read_media(path, spec=SPEC).waveform[:5000] == wave).all()


@pytest.mark.parametrize("codec,copied", [("libx264", True), ("mpeg4", False)])
def test_mux_keeps_the_video(tmp_path, codec, copied):
    path = make(tmp_path / "in.mp4", 17, codec=codec, rotation=90)
    tone = 0.5 * torch.sin(torch.arange(50_000) * 0.2)
    out = mux_audio(path, tone, tmp_path / "out.mp4", spec=SPEC)
    info, old, new = probe(out), read_media(path, spec=SPEC), read_media(out, spec=SPEC)
    assert info.video.n_frames == 17 and info.video.codec == "h264" and new.rotation == 90
    assert abs(info.audio.duration - info.video.duration) < 2e-3
    assert abs(new.duration - old.duration) < 2e-3
    error = (new.video.int() - old.video.int()).abs()
    assert error.max() == 0 if copied else error.float().mean() < 3
    assert (new.waveform[2000:27_000] - tone[2000:27_000]).abs().max() < 0.05
    wav = write_wav(tmp_path / "a.wav", tone, spec=SPEC)
    with pytest.raises(MediaError, match="no video"):
        mux_audio(wav, tone, tmp_path / "o.mp4", spec=SPEC)
    assert not (tmp_path / "o.mp4").exists()


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_mux_keeps_a_variable_rate(tmp_path, codec):
    "Also with frames stored out of order, where the header's duration is wrong."
    times = [Fraction(t, 1000) for t in (0, 40, 80, 120, 700, 740, 780, 1400, 1440, 1700)]
    path = make(tmp_path / "v.mp4", 10, times=times, codec=codec, b_frames=2, seconds=2)
    out = mux_audio(path, torch.zeros(9), tmp_path / "o.mp4", spec=SPEC)
    with av.open(str(out)) as box:
        found = [float(f.pts * f.time_base) for f in box.decode(video=0)]
    assert np.abs(np.sort(found) - np.array(times, float)).max() < 1e-3
    assert abs(probe(out).audio.duration - read_media(path, spec=SPEC).duration) < 0.01


@real
@pytest.mark.slow
@pytest.mark.parametrize("row", rows("video"), ids=lambda r: Path(r["file"]).name)
def test_mux_every_real_video(row, tmp_path):
    out = mux_audio(REAL / row["file"], torch.zeros(16_000), tmp_path / "o.mp4", spec=SPEC)
    info = probe(out)
    assert info.video.n_frames == int(row["v_frames"])
    assert abs(info.video.start + info.video.duration - float(row["v_end"])) < 0.01
    assert abs(info.audio.duration - float(row["v_end"])) < 0.01


# ---- long videos
@pytest.mark.parametrize("n", [1, 17, 18, 19, 30, 31, 100])
@pytest.mark.parametrize("overlap", [0, 6, 17])
def test_windows_cover_everything(n, overlap):
    starts = windows(n, SPEC, overlap=overlap)
    covered = set().union(*(range(s, s + 18) for s in starts))
    assert covered >= set(range(n)) and starts == sorted(set(starts))
    assert starts[-1] == max(0, n - 18)
    assert all(b - a <= 18 - overlap for a, b in zip(starts, starts[1:]))


@pytest.mark.parametrize("overlap", [0, 1, 6, 17])
def test_crossfade_is_seamless(overlap):
    starts = [s * 1600 for s in windows(50, SPEC, overlap=overlap)]
    wave = torch.sin(torch.arange(50 * 1600, dtype=torch.float64) * 0.05)
    pieces = [wave[s : s + 28_800] for s in starts]
    assert (crossfade(pieces, starts) - wave).abs().max() < 1e-6
    ones = crossfade([torch.ones(28_800) for _ in starts], starts)
    assert ones.shape == (80_000,) and (ones - 1).abs().max() < 1e-6


def test_fades_and_errors():
    rise = linear_fade(100)
    assert torch.allclose(rise + rise.flip(0), torch.ones(100)) and (rise.diff() > 0).all()
    rise = power_fade(100)
    assert torch.allclose(rise**2 + rise.flip(0) ** 2, torch.ones(100))
    one = torch.ones(4)
    for pieces, starts in (([], []), ([one], [0, 2]), ([one, one], [0, 5]), ([one, one], [3, 0])):
        with pytest.raises(ValueError, match="starts"):
            crossfade(pieces, starts)
    with pytest.raises(ValueError, match="overlap"):
        windows(30, SPEC, overlap=18)
    with pytest.raises(ValueError, match="start"):
        frame_window(torch.zeros(5, 2), 5, n_frames=2)
    assert frame_window(torch.arange(5), 3, n_frames=4).tolist() == [3, 4, 4, 4]
