"""The sound bank: bad files counted, hostile archives, a cache that is whole or absent, crops."""

import io
import json
import os
import random
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from cmmd import datasets, soundbank
from cmmd.core import ClipSpec, make_generator
from cmmd.datasets import FileReport, printable
from cmmd.media import MediaError, write_clip
from cmmd.soundbank import SoundBank, load_sounds, read_sound, toy_sounds

REAL = Path(__file__).resolve().parents[2] / "shared" / "real" / "audio"
RATE = 16_000


def tone(n: int = 4_000, frequency: float = 440.0) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * frequency * np.arange(n) / RATE)).astype(np.float32)


def wav(path: Path, wave=None, rate: int = RATE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, tone() if wave is None else wave, rate, subtype="FLOAT")
    return path


def wav_bytes(n: int = 4_000, frequency: float = 440.0) -> bytes:
    soundfile.write(buffer := io.BytesIO(), tone(n, frequency), RATE, "FLOAT", format="WAV")
    return buffer.getvalue()


def add(tar, name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = ""):
    member = tarfile.TarInfo(name)
    member.size, member.type, member.linkname = len(data), kind, link
    tar.addfile(member, io.BytesIO(data))


def tree(folder: Path) -> dict:  # everything in it, links not followed
    return {
        path.relative_to(folder).as_posix(): (s.st_mode, s.st_size, s.st_mtime_ns)
        for path in folder.rglob("*")
        for s in [path.lstat()]
    }


def same(a: SoundBank, b: SoundBank) -> bool:
    alike = (a.ids, a.lengths, a.digest, a.fingerprint) == (
        b.ids,
        b.lengths,
        b.digest,
        b.fingerprint,
    )
    return alike and torch.equal(a.samples, b.samples)


@pytest.fixture
def quick(monkeypatch):
    "read_sound without a child process; the names it was asked for."
    asked = []

    def read(path, *, sample_rate):
        asked.append(Path(path))
        try:
            return torch.from_numpy(
                soundfile.read(io.BytesIO(path.read_bytes()), dtype="float32")[0]
            )
        except soundfile.LibsndfileError:
            raise MediaError(f"{path}: damaged") from None

    monkeypatch.setattr(soundbank, "read_sound", read)
    return asked


@pytest.fixture
def no_decoder(monkeypatch):
    def read_media(*_, **__):
        raise AssertionError("was decoded again")

    def off():
        monkeypatch.setattr(soundbank, "read_media", read_media)
        monkeypatch.setattr(soundbank, "read_sound", read_media)

    return off


# ---- real decoding
def test_bad_files_are_listed_exactly(tmp_path):
    folder = tmp_path / "in"
    wav(folder / "good.wav")
    wav(folder / "long.WAV", tone(70_000))
    (folder / "zero.wav").touch()
    (folder / "text.flac").write_text("no sound")
    wav(folder / "silent.wav", np.zeros(4_000, np.float32))
    wav(folder / "faint.wav", tone() * 1e-4)
    wav(folder / "nan.wav", np.where(np.arange(4_000) == 77, np.nan, tone()))
    wav(folder / "inf.wav", np.where(np.arange(4_000) == 77, np.inf, tone()))
    cut = wav(folder / "cut.wav", tone(70_000))
    cut.write_bytes(cut.read_bytes()[:100_000])
    wav(folder / "none.wav", np.zeros(0, np.float32))
    (folder / "broken_link.wav").symlink_to(folder / "nowhere.wav")
    os.mkfifo(folder / "pipe.wav")
    (folder / "notes.txt").write_text("ignored")
    video = torch.zeros(5, 16, 16, 3, dtype=torch.uint8)
    write_clip(folder / "mute.mp4", video, None, spec=ClipSpec.toy())
    told = {}
    bank, report = load_sounds(folder, tmp_path / "c", max_bad=1, on_file=told.__setitem__)
    assert bank.ids == ("good.wav", "long.WAV") and report.padded == ("good.wav",)
    reasons = {
        "zero.wav": "is empty",
        "text.flac": "damaged, or no media file",
        "silent.wav": "is silent",
        "faint.wav": "is silent",
        "nan.wav": "holds NaN or infinite samples",
        "inf.wav": "holds NaN or infinite samples",
        "cut.wav": "holds a corrupt audio packet",
        "none.wav": "",
        "broken_link.wav": "cannot be opened",
        "pipe.wav": "is not an ordinary file",
        "mute.mp4": "holds no sound",
    }
    assert set(report.skipped) == set(reasons)
    for name, reason in reasons.items():
        assert reason in report.skipped[name] and str(tmp_path) not in report.skipped[name]
        assert len(report.skipped[name].splitlines()) == 1
    assert list(told) == sorted(told) and {n for n, why in told.items() if why} == set(reasons)
    assert json.loads((tmp_path / "c/report.json").read_text()) == report.to_dict() | {
        "padded": list(report.padded)
    }
    with pytest.raises(ValueError, match=r"^11 of 13 files .*--allow-bad") as error:
        load_sounds(folder, tmp_path / "c")
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("n", [1, 16_001])
def test_a_sound_keeps_its_last_sample(tmp_path, n):
    wave = tone(n) + 0.1
    assert np.array_equal(read_sound(wav(tmp_path / "a.wav", wave)).numpy(), wave)


@pytest.mark.skipif(not REAL.is_dir(), reason="no real sounds beside the checkout")
def test_real_sounds(tmp_path, no_decoder):
    bank, report = load_sounds(REAL, tmp_path / "cache")
    assert len(os.listdir(REAL)) == 20 == report.n_read + len(report.skipped)
    # 48 samples at 48 kHz, hardly more than the last bit: at 16 kHz nothing is left of them
    assert set(report.skipped) == {"odd_silence.wav", "odd_48_samples.wav"}
    assert all("is silent" in reason for reason in report.skipped.values())
    assert {"odd_alaw.wav", "odd_float64.wav"} < set(report.padded)
    assert len(report.padded) == 4 and bank.samples.isfinite().all()
    lengths = dict(zip(bank.ids, bank.lengths))
    for name in ("esc_cat.wav", "castanets48_stereo.wav", "sweet_waltz.ogg", "violin_vgg_16k.wav"):
        info = soundfile.info(REAL / name)
        assert abs(lengths[name] - info.frames * RATE / info.samplerate) <= 1
    no_decoder()
    assert same(bank, load_sounds(REAL, tmp_path / "cache")[0])


# ---- the cache
def test_cache_is_reused_and_rebuilt(tmp_path, quick, no_decoder, monkeypatch):
    folder, cache = tmp_path / "in", tmp_path / "out" / "cache"
    for i in range(3):
        wav(folder / f"{i}.wav", tone(4_000 + i))
    first, _ = load_sounds(folder, cache)
    assert len(quick) == 3
    with monkeypatch.context() as m:
        m.setattr(soundbank, "read_sound", None)
        moved = folder.rename(tmp_path / "moved")  # the names inside are what counts
        assert same(first, load_sounds(moved, cache)[0])
        assert load_sounds(moved, cache, least=4_002)[1].padded == ("0.wav", "1.wav")
        assert load_sounds(moved, cache, least=1)[1].padded == ()
    changes = [
        lambda: wav(moved / "1.wav", tone(5_000)),
        lambda: os.utime(moved / "2.wav", ns=(1, 1)),
        lambda: wav(moved / "new" / "3.wav"),
        lambda: (moved / "0.wav").unlink(),
        lambda: (moved / "1.wav").rename(moved / "9.wav"),
    ]
    for change in changes:
        change()
        quick.clear()
        bank, report = load_sounds(moved, cache)
        assert len(quick) == len(bank) == report.n_read
    quick.clear()
    load_sounds(moved, cache, sample_rate=8_000)
    assert len(quick) == 3
    no_decoder()
    load_sounds(moved, cache, sample_rate=8_000)


def test_damaged_cache_is_rebuilt(tmp_path, quick):
    folder, cache = tmp_path / "in", tmp_path / "cache"
    for i in range(2):
        wav(folder / f"{i}.wav", tone(4_000 + i))
    wav(folder / "bad.wav").write_text("text")
    bank, report = load_sounds(folder, cache, max_bad=0.5)
    index = json.loads((cache / "sounds.json").read_text())
    data, samples = (cache / "sounds.json").read_bytes(), (cache / "sounds.f32").read_bytes()
    changes = [{k: v} for k in index for v in (None, 7, -1.5, "x", [], {}, [None], True, [[]])]
    changes += [{"lengths": [8_001]}, {"lengths": [8_000, 1]}, {"ids": ["0.wav"] * 2}]
    changes += [{"lengths": [10**30, 1]}, {"lengths": [4_000.0, 4_001.0]}, {"skipped": {"a": 1}}]
    bad = [json.dumps(index | change).encode() for change in changes]
    sound = {"skipped": {}}, {"format": True}, {"lengths": [8_000, 1]}  # nothing wrong in itself
    for change in changes:  # forged with care: types and sums are checked as well
        forged = {k: v for k, v in (index | change).items() if k != "seal"}
        seal = datasets.json_digest(forged)
        if change not in (*sound, {"seal": change.get("seal")}):
            bad.append(json.dumps(forged | {"seal": seal}).encode())
    bad += [b"", b"\xff\xfe", b"null", b"{", b"[" * 200_000, data[: len(data) // 2]]
    rng, listing = random.Random(0), soundbank._find_files(folder)[1]
    assert soundbank._cached(cache, listing, RATE)
    for i, text in enumerate(bad):
        (cache / "sounds.json").write_bytes(text)
        assert soundbank._cached(cache, listing, RATE) is None, text[:100]
        if i % 30 == 0:
            quick.clear()
            again, its_report = load_sounds(folder, cache, max_bad=0.5)
            assert same(bank, again) and its_report == report and len(quick) == 3
    for bytes_ in (b"", samples[:-1], samples + b"0", samples[: rng.randrange(len(samples))]):
        (cache / "sounds.f32").write_bytes(bytes_)
        assert same(bank, load_sounds(folder, cache, max_bad=0.5)[0])
    (cache / "sounds.f32").unlink()
    (cache / "sounds.f32").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").write_bytes(samples)
    assert same(bank, load_sounds(folder, cache, max_bad=0.5)[0])
    assert (tmp_path / "elsewhere").read_bytes() == samples  # the link was replaced, not followed


def test_a_kill_leaves_the_old_cache_or_none(tmp_path, quick, monkeypatch):
    "Stopped before each step that changes a file's name, and while samples are written."
    folder, cache = tmp_path / "in", tmp_path / "cache"
    wav(folder / "a.wav")
    old, _ = load_sounds(folder, cache)
    wav(folder / "a.wav", tone(4_000, 880.0))  # as many samples as before
    os.utime(folder / "a.wav", ns=(5, 5))

    class Killed(BaseException):
        pass

    for stop in range(1, 9):
        count = iter(range(1, 100))

        def event(real, *args, **options):
            if next(count) == stop:
                raise Killed
            return real(*args, **options)

        with monkeypatch.context() as m:
            m.setattr(Path, "unlink", lambda *a, _f=Path.unlink, **o: event(_f, *a, **o))
            for name in ("replace", "fsync"):
                real = getattr(os, name)
                m.setattr(os, name, lambda *a, _f=real, **o: event(_f, *a, **o))
            try:
                load_sounds(folder, cache)
            except Killed:
                pass
        rows = soundbank._find_files(folder)[1]
        about = soundbank._cached(cache, rows, RATE)
        data = np.fromfile(cache / "sounds.f32", "<f4")
        if about:  # then index and samples are both of the new file
            assert np.array_equal(data, tone(4_000, 880.0))
        elif (cache / "sounds.json").exists():  # then both are still of the old one
            assert np.array_equal(data, old.samples.numpy())
    (cache / "sounds.f32.partial").write_bytes(b"half")
    (cache / "sounds.json").unlink(missing_ok=True)
    bank, _ = load_sounds(folder, cache)
    assert torch.equal(bank[0], torch.from_numpy(tone(4_000, 880.0)))
    assert torch.equal(old[0], torch.from_numpy(tone()))  # who has mapped the old file keeps it
    assert not list(cache.glob("*.partial*"))


def test_a_partial_that_is_a_link_is_not_written_through(tmp_path, quick):
    wav(tmp_path / "in" / "a.wav")
    (tmp_path / "cache").mkdir()
    (tmp_path / "precious").write_text("mine")
    for name in ("sounds.f32.partial", "sounds.json.partial", "report.json", "sounds.lock"):
        (tmp_path / "cache" / name).symlink_to(tmp_path / "precious")
    assert len(load_sounds(tmp_path / "in", tmp_path / "cache")[0]) == 1
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_full_disk_is_one_line_and_leaves_no_cache(tmp_path, quick, monkeypatch):
    wav(tmp_path / "in" / "a.wav", tone(50_000))
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match=r"sounds\.f32\.partial.*200,000 bytes") as error:
            load_sounds(tmp_path / "in", tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(str(error.value).splitlines()) == 1
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["sounds.lock"]


def test_two_at_once_decode_once(tmp_path, quick):
    for i in range(6):
        wav(tmp_path / "in" / f"{i}.wav")
    banks = []

    def load():
        banks.append(load_sounds(tmp_path / "in", tmp_path / "cache")[0])

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(quick) == 6 and len(banks) == 4 and all(same(banks[0], b) for b in banks)


# ---- archives
def test_hostile_archive_writes_nothing_and_follows_nothing(tmp_path, quick, monkeypatch):
    folder, cache, scratch = tmp_path / "in", tmp_path / "cache", tmp_path / "tmp"
    secret = wav(tmp_path / "secret.wav", tone(9_999))
    folder.mkdir()
    scratch.mkdir()
    monkeypatch.setattr(soundbank.tempfile, "tempdir", str(scratch))
    monkeypatch.setattr(soundbank, "MEMBER_BYTES", 20_000)
    data = wav_bytes()
    with tarfile.open(folder / "evil.tar", "w") as tar:
        add(tar, "../../up.wav", data)
        add(tar, f"{tmp_path}/absolute.wav", data)
        add(tar, "link.wav", kind=tarfile.SYMTYPE, link=str(secret))
        add(tar, "hard.wav", kind=tarfile.LNKTYPE, link=str(secret))
        add(tar, "dir", kind=tarfile.SYMTYPE, link=str(tmp_path))
        add(tar, "dir/through.wav", data)
        add(tar, "null.wav", kind=tarfile.CHRTYPE)
        add(tar, "pipe.wav", kind=tarfile.FIFOTYPE)
        add(tar, "folder.wav", kind=tarfile.DIRTYPE)
        add(tar, "twice.wav", data)
        add(tar, "twice.wav", data)
        add(tar, "./twice.wav", data)
        add(tar, "big.wav", wav_bytes(6_000))
        add(tar, "esc\x1b[2J\n.wav", data)
        add(tar, "a.tar", data)
        add(tar, "run.py", b"raise SystemExit")
    before = tree(tmp_path)
    bank, report = load_sounds(folder, cache, max_bad=1)
    inside = "/".join(p for p in tmp_path.parts if p != "/")
    assert bank.ids == tuple(
        f"evil.tar/{name}"
        for name in (
            "up.wav",
            f"{inside}/absolute.wav",
            "dir/through.wav",
            "twice.wav",
            "esc\x1b[2J\n.wav",
        )
    )
    assert report.skipped.keys() == {
        "evil.tar/twice.wav (2)",
        "evil.tar/twice.wav (3)",
        "evil.tar/big.wav",
    }
    assert set(bank.lengths) == {4_000} and all(path.parent.parent == scratch for path in quick)
    assert all(line.isprintable() for line in report.lines())
    after = tree(tmp_path)
    new = {name for name in after if after[name] != before.get(name)} - {"tmp"}
    assert new == {
        f"cache{x}" for x in ("", *(f"/sounds.{e}" for e in ("f32", "json", "lock")))
    } | {"cache/report.json"}
    assert before.keys() <= after.keys() and not list(scratch.iterdir())


def test_cut_archives_keep_what_came_before(tmp_path, quick):
    folder = tmp_path / "in"
    folder.mkdir()
    with tarfile.open(folder / "whole.tar", "w") as tar:
        for i in range(3):
            add(tar, f"{i}.wav", wav_bytes())
    data = (folder / "whole.tar").read_bytes()
    size = len(data[: data.rindex(b"2.wav")]) // 2  # of a header and a sound
    for n_bytes, kept in ((0, 0), (100, 0), (512, 0), (size, 1), (size + 99, 1), (2 * size, 2)):
        (folder / "whole.tar").write_bytes(data[:n_bytes])
        cache = tmp_path / f"{n_bytes}"
        if not kept:
            with pytest.raises(ValueError, match="none of 1 files can be used; .*whole.tar"):
                load_sounds(folder, cache, max_bad=1)
            continue
        bank, report = load_sounds(folder, cache, max_bad=1)
        assert bank.ids == tuple(f"whole.tar/{i}.wav" for i in range(kept))
        assert list(report.skipped) == ["whole.tar"] and "damaged" in report.skipped["whole.tar"]
    (folder / "whole.tar").write_bytes(data[:512] + b"\xff" * 512 + data[1024:])
    rng = random.Random(1)
    for i in range(60):  # never more than a reason
        broken = bytearray(data)
        for _ in range(20):
            broken[rng.choice((0, size, 2 * size)) + rng.randrange(512)] = rng.randrange(256)
        (folder / "whole.tar").write_bytes(broken)
        with soundbank.tempfile.TemporaryDirectory() as scratch:
            found = list(soundbank._tar_sounds(folder / "whole.tar", Path(scratch)))
        assert len(found) <= 4
    (folder / "whole.tar").write_bytes(data)
    bank, _ = load_sounds(folder / "whole.tar", tmp_path / "one")  # the archive itself as source
    assert bank.ids == tuple(f"whole.tar/{i}.wav" for i in range(3))


# ---- order, crops, names
def test_order_does_not_depend_on_threads(tmp_path, monkeypatch):
    for i in range(24):
        wav(tmp_path / "in" / f"{'ab'[i % 2]}" / f"{i}.wav", tone(1_000 + i))
    with tarfile.open(tmp_path / "in" / "a" / "s.tar", "w") as tar:
        for i in range(6):
            add(tar, f"{9 - i}.wav", wav_bytes(2_000 + i))
    held, most, lock = 0, 0, threading.Lock()

    def read(path, *, sample_rate):
        nonlocal held, most
        with lock:
            held += 1
            most = max(most, held)
        time.sleep(0.02 * (hash(Path(path).name) % 3))
        return torch.from_numpy(soundfile.read(path, dtype="float32")[0])

    def done(name, reason):
        nonlocal held
        with lock:
            held -= 1

    monkeypatch.setattr(soundbank, "read_sound", read)
    banks = []
    for cores in (1, 2, 8):
        monkeypatch.setattr(os, "cpu_count", lambda: cores)
        held, most = 0, 0
        banks.append(load_sounds(tmp_path / "in", tmp_path / f"{cores}", on_file=done)[0])
        assert most <= 2 * cores + 2  # never the whole folder in memory
    assert all(same(banks[0], b) for b in banks)
    assert len(banks[0]) == 30 and banks[0].ids[-1] == "b/9.wav"
    assert banks[0].lengths[banks[0].ids.index("a/s.tar/9.wav")] == 2_000


def test_crops_are_inside_and_repeatable(tmp_path, quick):
    for i, n in enumerate((500, 1_000, 1_001, 9_000)):
        wav(tmp_path / "in" / f"{i}.wav", np.arange(1, n + 1, dtype=np.float32) / 10_000)
    bank, report = load_sounds(tmp_path / "in", tmp_path / "cache", least=1_000)
    assert report.padded == ("0.wav",) and report.crop_s == 1_000 / RATE
    firsts = set()
    for position in range(400):
        i = position % 4
        one, two = (
            bank.crop(i, 1_000, generator=make_generator(3, position)).mul(10_000).round()
            for _ in range(2)
        )
        assert torch.equal(one, two) and len(one) == 1_000
        sound = one[one > 0]
        assert len(sound) == min(1_000, bank.lengths[i])
        assert torch.equal(sound, sound[0] + torch.arange(float(len(sound))))
        firsts.add((i, int(sound[0]) if i else int((one > 0).nonzero()[0])))
    assert {i for i, _ in firsts} == {0, 1, 2, 3}
    assert {f for i, f in firsts if i == 1} == {1} and {f for i, f in firsts if i == 2} == {1, 2}
    assert len({f for i, f in firsts if i in (0, 3)}) > 150
    crop = bank.crop(3, 1_000, generator=make_generator(0))
    crop.zero_()
    assert bank[3].min() > 0


def test_toy_sounds_are_those_the_shipped_vocoder_was_trained_on():
    assert toy_sounds(64).fingerprint == "d258a7738e5333b3"


def test_odd_names(tmp_path, quick):
    names = [
        "caf\u00e9.wav",
        "new\nline.wav",
        "\x1b[31mred.wav",
        "rtl\u202e.wav",
        "x" * 200 + ".wav",
    ]
    for name in names:
        wav(tmp_path / "in" / "a.wav").rename(tmp_path / "in" / name)
    raw = os.fsencode(tmp_path / "in") + b"/\xff\xfe.wav"
    os.rename(wav(tmp_path / "in" / "a.wav"), raw)
    (tmp_path / "in" / "bad\n.wav").write_text("text")
    bank, report = load_sounds(tmp_path / "in", tmp_path / "cache")
    assert set(bank.ids) == {*names, os.fsdecode(b"\xff\xfe.wav")}
    again, _ = load_sounds(tmp_path / "in", tmp_path / "cache")
    assert same(bank, again) and len(quick) == 7
    assert report.lines()[1:] == ["  bad\\n.wav: damaged"]


def test_report():
    many = {f"{i}": "is empty" for i in range(12)}
    report = FileReport(312, ("a",), many, 4.096)
    assert report.lines()[0] == ("312 files read, 1 shorter than 4.096 s (padded), 12 skipped:")
    assert report.lines()[-1] == "  ... and 2 more" and len(report.lines()) == 12
    assert len(report.lines(most=12)) == 13
    assert FileReport(2, (), {}).lines() == ["2 files read, 0 skipped"]
    report.check(0.2)
    with pytest.raises(ValueError, match=r"^12 of 324 files"):
        report.check(0.01)
    for empty, text in (
        (FileReport(0, (), {}), "no file"),
        (FileReport(0, (), many), "none of 12"),
    ):
        with pytest.raises(ValueError, match=text):
            empty.check(1)
    assert len(printable("\n" * 500)) == 100 and printable("\ud800\u202e") == "\\ud800\\u202e"


def test_wrong_arguments(tmp_path, quick):
    wav(tmp_path / "in" / "a.wav")
    bad = [
        ({"sample_rate": 0}, "sample_rate"),
        ({"sample_rate": "x"}, "sample_rate"),
        ({"least": 0}, "least"),
        ({"max_bad": 1.5}, "max_bad"),
        ({"max_bad": None}, "max_bad"),
    ]
    for options, name in bad:
        with pytest.raises((ValueError, TypeError), match=name):
            load_sounds(tmp_path / "in", tmp_path / "cache", **options)
    (tmp_path / "empty").mkdir()
    for source, kind in (
        ("empty", ValueError),
        ("in/a.wav", ValueError),
        ("no", FileNotFoundError),
    ):
        with pytest.raises(kind, match="source"):
            load_sounds(tmp_path / source, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
