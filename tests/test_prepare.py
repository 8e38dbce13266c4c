"""Preparing data: all files accounted for, a kill costs one shard, damage is found when read."""

import errno
import fcntl
import gzip
import hashlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import same
from test_media import levels
from test_media import make as make_film

from cmmd import cli, datasets
from cmmd.contrastive import ContrastiveConfig, ContrastiveLossFn
from cmmd.core import ClipSpec
from cmmd.datasets import (
    PrepareConfig,
    ShardDataset,
    Source,
    SourceList,
    clip_starts,
    folder_sources,
    get_json,
    open_dataset,
    prepare,
    put_json,
    read_cuts,
    vae_digest,
    verify_dataset,
)
from cmmd.evaluate import stored_material
from cmmd.latents import load_vae
from cmmd.media import MediaError, write_clip, write_wav
from cmmd.mel import griffin_lim
from cmmd.pipeline import new_model
from cmmd.sources import aist_sources, epic_sources, parse_aist
from cmmd.toy import make_clips
from cmmd.train import TrainConfig, train
from cmmd.unet import UNetConfig

REAL = Path(__file__).resolve().parents[2] / "shared" / "real"
BIN = Path(sys.executable).parent
SPEC = ClipSpec.toy()
PLAN = PrepareConfig(clip=SPEC, vae="tiny", stride=5, shard_sources=1)
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="no real data beside the checkout")


@pytest.fixture(scope="module")
def vae():
    return load_vae("tiny")


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    folder, long = tmp_path_factory.mktemp("films"), SPEC.with_frames(36)
    clips = make_clips(6, spec=long, seed=11)
    loud = [i for i in range(6) if clips.waveform[i].abs().max() > 0.01][:3]
    for i in loud:
        write_clip(folder / f"{i}.mp4", clips.video[i], clips.waveform[i], spec=long)
    return folder


@pytest.fixture(scope="module")
def data(films, vae, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "data"
    prepare(folder_sources(films, test_share=0.0), folder, config=PLAN, vae=vae)
    return folder


def shards(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "prepare.lock"}


BAD = {  # file -> why no clip can be made of it
    "zero.mp4": "is empty",
    "loop.mp4": "cannot be opened",
    "dangling.mp4": "cannot be opened",
    "folder.mp4": "is not an ordinary file",
    "pipe.mp4": "is not an ordinary file",
    "device.mp4": "is not an ordinary file",
    "a\nb\x1b[31m.mp4": "damaged, or no media file|no container",
    "mute.mp4": "holds no sound",
    "silent.mp4": "is silent",
    "one_frame.mp4": "0.00 s can be used",
    # from here on only in the full figure
    "short.mp4": "0.20 s can be used",
    "half_the_sound.mp4": "0.10 s can be used",
    "truncated.mp4": "damaged|cut off|could be decoded|corrupt",
    "noise.mkv": "damaged, or no media file|no container",
    "program.mkv": "damaged, or no media file|no container",
    "music.mp4": "holds no video",
    "picture.mp4": "damaged, or no media file|no container",
    "list.ts": "damaged, or no media file|no container",
    "packed.mp4": "damaged, or no media file|no container",
    os.fsdecode(b"\xff.mp4"): "is empty",
}
FAST = 10


def make_bad(folder: Path, good: Path, names) -> None:
    "Files of which no clip can be made, each for another reason."
    content, long = good.read_bytes(), SPEC.with_frames(50)
    clip, rng = make_clips(1, spec=long, seed=11), random.Random(0)
    video, sound = clip.video[0], clip.waveform[0]
    quiet = 0 * sound
    make = {
        "loop.mp4": lambda p: p.symlink_to(p),
        "dangling.mp4": lambda p: p.symlink_to(p.with_name("nowhere.mp4")),
        "folder.mp4": Path.mkdir,
        "pipe.mp4": os.mkfifo,
        "device.mp4": lambda p: p.symlink_to("/dev/null"),
        "mute.mp4": lambda p: write_clip(p, video, None, spec=long),
        "silent.mp4": lambda p: write_clip(p, video, quiet, spec=long),
        "one_frame.mp4": lambda p: write_clip(p, video[:1], sound[:1600], spec=long),
        "short.mp4": lambda p: write_clip(p, video[:10], sound[:16_000], spec=long),
        "half_the_sound.mp4": lambda p: make_film(p, 40, seconds=0.9),
        "truncated.mp4": lambda p: p.write_bytes(content[: len(content) // 3]),
        "noise.mkv": lambda p: p.write_bytes(rng.randbytes(20_000)),
        "program.mkv": lambda p: shutil.copy(sys.executable, p),
        "music.mp4": lambda p: write_wav(p, sound, spec=SPEC),
        "picture.mp4": lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100)),
        "list.ts": lambda p: p.write_text("#EXTM3U\n#EXTINF:9,\nfile:///etc/passwd\n"),
        "packed.mp4": lambda p: p.write_bytes(gzip.compress(content)),
        "unreadable.mp4": lambda p: (p.write_bytes(content), p.chmod(0)),
    }
    for name in names:
        text = b"" if "is empty" in BAD.get(name, "") else b"this is no film"
        make.get(name, lambda p, text=text: p.write_bytes(text))(folder / name)


VARIABLE = [Fraction(t, 20) for t in (0, 1, 2, 3, 9, 10, 11, 20, 22, 23, 30, 31, 39, 40, 52, 60)]


def check_odd_films(folder: Path) -> None:
    "A film of variable rate and one that is stored lying on its side are read as they look."
    for path in (folder / "variable.mp4", folder / "rotated.mp4", folder / "plain.mp4"):
        assert len(read_cuts(Source("x", str(path)), PLAN)) >= 1
    (variable, *_), (lying, *_), (plain, *_) = (
        read_cuts(Source("x", str(folder / f"{name}.mp4")), PLAN)
        for name in ("variable", "rotated", "plain")
    )
    shown = levels(variable.video)
    truth = [max(i for i, t in enumerate(VARIABLE) if t <= Fraction(k, 10)) for k in range(26)]
    assert variable.start == 0.4 and abs(shown - truth).max() < 0.4
    turned = torch.rot90(plain.video, 1, (1, 2))
    assert (lying.video.int() - turned.int()).abs().max() <= 2


def make_odd_films(folder: Path) -> set[str]:
    make_film(folder / "variable.mp4", 16, times=VARIABLE, seconds=3.2)
    make_film(folder / "rotated.mp4", 40, rotation=90)
    make_film(folder / "plain.mp4", 40)
    (folder / "notes.txt").write_text("no film, and not called one")
    return {"variable.mp4", "rotated.mp4", "plain.mp4"}


def check_report(report: dict, bad: set[str], n_good: int) -> None:
    assert set(report["skipped"]) == bad and report["n_read"] == n_good
    for name, why in report["skipped"].items():
        assert re.search(BAD[name], why) and "\n" not in why, (name, why)


def test_every_bad_file_is_named_and_the_good_ones_are_kept(films, vae, tmp_path):
    shutil.copytree(films, tmp_path / "in")
    odd, bad = make_odd_films(tmp_path / "in"), list(BAD)[:FAST]
    good = {p.name for p in films.iterdir()} | odd
    make_bad(tmp_path / "in", next(films.iterdir()), bad)
    sources = folder_sources(tmp_path / "in", test_share=0.0)
    report = prepare(sources, tmp_path / "out", config=PLAN, vae=vae, max_bad=1.0)
    check_report(report.to_dict(), set(bad), len(good))
    assert "\n" not in (text := " ".join(report.lines(99))) and "\x1b" not in text
    assert json.loads((tmp_path / "out" / "report.json").read_text())["skipped"] == report.skipped
    assert {row["source"] for row in ShardDataset(tmp_path / "out").rows} == good
    with pytest.raises(ValueError, match="cannot be used"):
        prepare(sources, tmp_path / "out", config=PLAN, vae=vae, max_bad=0.2)
    check_odd_films(tmp_path / "in")


@pytest.mark.slow
def test_60_good_and_20_bad_files(films, tmp_path, capsys):
    place, out = tmp_path / "in", tmp_path / "out"
    shutil.copytree(films, place)
    odd = make_odd_films(place)
    first = sorted(films.iterdir())[0]
    for i in range(60 - len(odd) - len(list(films.iterdir()))):
        suffix = ("mp4", "MOV", "m4v")[i % 3]
        shutil.copy(first, place / f"more {i}.{suffix}")
    bad = list(BAD)
    assert len(bad) == 20
    make_bad(place, first, bad)
    ask = ["prepare", str(place), "--out", str(out), "--config", "tiny", "--test-share", "0"]
    assert cli.run(ask) == 1
    told = capsys.readouterr().err
    assert "20 of 80 files cannot be used (25%), more than 20%" in told and "--allow-bad" in told
    assert not (out / "index.json").exists()
    assert cli.run([*ask, "--allow-bad"]) == 0
    check_report(json.loads((out / "report.json").read_text()), set(bad), 60)
    assert len({row["source"] for row in ShardDataset(out).rows}) == 60
    check_odd_films(place)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_named(films, tmp_path):
    (tmp_path / "locked").mkdir(mode=0)
    make_bad(tmp_path, next(films.iterdir()), ["unreadable.mp4"])
    for source in folder_sources(tmp_path):
        with pytest.raises(MediaError, match="Permission denied"):
            read_cuts(source, PLAN)


def run_prepare(films, out):
    torch.set_num_threads(1)
    prepare(folder_sources(films, test_share=0.0), out, config=PLAN, vae=load_vae("tiny"))


def test_a_killed_process_costs_nothing_to_those_beside_it(films, data, vae, tmp_path):
    spawn, out = multiprocessing.get_context("spawn"), tmp_path / "out"
    workers = [spawn.Process(target=run_prepare, args=(films, out)) for _ in range(2)]
    for worker in workers:
        worker.start()
    while all(w.is_alive() for w in workers) and not list(out.glob("shard-*.json")):
        time.sleep(0.02)
    os.kill(workers[0].pid, signal.SIGKILL)
    for worker in workers:
        worker.join()
    assert workers[1].exitcode == 0
    assert shards(out) == shards(data), "bit for bit what an undisturbed run wrote"
    seen, sources = [], folder_sources(films, test_share=0.0)
    prepare(sources, out, config=PLAN, vae=vae, on_source=lambda *x: seen.append(x))
    assert not seen, "nothing is done again"
    (out / "shard-000001.json").unlink()
    prepare(sources, out, config=PLAN, vae=vae, on_source=lambda *x: seen.append(x))
    assert len(seen) == 1 and shards(out) == shards(data), "only what is missing"


@pytest.mark.slow
@pytest.mark.parametrize("launch", (("accelerate", "launch", "--multi_gpu"), ("torchrun",)))
def test_two_launched_processes_share_the_shards(launch, films, tmp_path):
    command = [str(BIN / "cmmd"), "prepare", str(films), "--config", "tiny", "--test-share", "0"]
    command += ["--stride", "5"]
    several = ["--num_processes", "2"] if launch[0] == "accelerate" else ["--nproc_per_node", "2"]
    several += ["--main_process_port" if launch[0] == "accelerate" else "--master_port", "0"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, first in (("one", []), ("two", [str(BIN / launch[0]), *launch[1:], *several])):
        done = subprocess.run(
            [*first, *command, "--out", str(tmp_path / name)],
            env=env,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
    assert shards(tmp_path / "one") == shards(tmp_path / "two")


def run_unlocked(films, out):
    fcntl.lockf = lambda *_: None  # a disk that says yes to every lock
    run_prepare(films, out)


def test_without_locks_work_is_done_twice_but_nothing_is_damaged(films, data, tmp_path):
    spawn, out = multiprocessing.get_context("spawn"), tmp_path / "out"
    workers = [spawn.Process(target=run_unlocked, args=(films, out)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [w.exitcode for w in workers] == [0, 0] and shards(out) == shards(data)


def test_a_disk_that_keeps_no_locks_is_named(films, data, vae, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with pytest.warns(UserWarning, match="keeps no locks"):
        prepare(folder_sources(films, test_share=0.0), tmp_path / "out", config=PLAN, vae=vae)
    assert shards(tmp_path / "out") == shards(data)


def test_the_shard_of_one_machine_beside_the_index_of_another_is_made_again(
    films, data, vae, tmp_path
):
    shutil.copytree(data, out := tmp_path / "out")
    row = get_json(out / "shard-000001.json")["clips"][-1]
    with open(out / "shard-000001.tar", "r+b") as file:
        file.seek(row["offset"] + row["bytes"] - 1)
        file.write(b"\xaa")
    seen = []
    prepare(
        folder_sources(films, test_share=0.0),
        out,
        config=PLAN,
        vae=vae,
        on_source=lambda *x: seen.append(x),
    )
    assert len(seen) == 1 and shards(out) == shards(data)


def test_what_a_dead_process_has_begun_is_removed(films, data, vae, tmp_path):
    shutil.copytree(data, out := tmp_path / "out")
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    here, name = datasets._host(), "shard-000000.tar"
    kept = [
        f"{name}.{here}-{os.getpid()}-abcd.partial",
        f"{name}.00000000-1-abcd.partial",
        "x.partial",
    ]
    lost = [f"{name}.{here}-{gone.pid}-abcd.partial", f"{name}.00000000-2-abcd.partial"]
    for partial in (*kept, *lost):
        (out / partial).write_bytes(b"half")
    os.utime(out / lost[1], (0, 0))  # of another machine, and old
    prepare(folder_sources(films, test_share=0.0), out, config=PLAN, vae=vae)
    assert {p.name for p in out.glob("*.partial")} == set(kept)


def test_the_evaluator_judges_the_test_split_of_a_prepared_folder(films, vae, tmp_path):
    train_one, *tests = folder_sources(films, test_share=0.0)
    sources = [train_one, *(replace(s, split="test") for s in tests)]
    prepare(sources, tmp_path / "data", config=PLAN, vae=vae)
    judged = stored_material(tmp_path / "data", 100, vae=vae, vocoder=griffin_lim, spec=SPEC)
    held_out = ShardDataset(tmp_path / "data", "test")
    assert judged.ids == held_out.ids and train_one.id not in str(judged.ids)
    assert torch.allclose(judged.mel[0], held_out.tensors(0)["mel"], atol=1e-4)


def test_other_settings_or_sources_are_refused_with_the_difference(films, vae, data):
    sources = folder_sources(films, test_share=0.0)
    with pytest.raises(ValueError, match="margin: 4 there, 2 now"):
        prepare(sources, data, config=replace(PLAN, margin=2), vae=vae)
    with pytest.raises(ValueError, match="n: .* there"):
        prepare(sources[1:], data, config=PLAN, vae=vae)
    with pytest.raises(ValueError, match="the sources are others"):
        prepare([replace(s, split="test") for s in sources], data, config=PLAN, vae=vae)


def test_another_vae_of_the_same_name_is_refused(films, vae, data):
    other = load_vae("tiny")
    next(other.parameters()).data += 1e-4
    assert vae_digest(other) != vae_digest(vae) == vae_digest(load_vae("tiny"))
    with pytest.raises(ValueError, match="vae_weights: '[0-9a-f]{16}' there, '[0-9a-f]{16}' now"):
        prepare(folder_sources(films, test_share=0.0), data, config=PLAN, vae=other)
    assert ShardDataset(data).vae_weights == vae_digest(vae)
    other.register_to_config(scaling_factor=2 * other.config.scaling_factor)
    assert vae_digest(other) != vae_digest(load_vae("tiny"))


def test_a_folder_of_an_older_version_is_still_read(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    about = {k: v for k, v in get_json(data / "index.json").items() if k != "vae_weights"}
    put_json(tmp_path / "data" / "index.json", about)
    old, new = ShardDataset(tmp_path / "data"), ShardDataset(data)
    assert old.vae_weights is None and old.fingerprint == new.fingerprint


def test_a_full_disk_is_one_line_and_the_run_goes_on(films, data, vae, tmp_path, monkeypatch):
    def full(sink, content):
        if sink.path.name == "shard-000001.tar" and sink.size > 50_000:
            with datasets.writing(sink.path, sink.size + len(content)):
                raise OSError(28, "No space left on device")
        return real(sink, content)

    real, sources = datasets.Sink.write, folder_sources(films, test_share=0.0)
    monkeypatch.setattr(datasets.Sink, "write", full)
    with pytest.raises(OSError, match=r"shard-000001.tar: cannot write [\d,]+ bytes"):
        prepare(sources, tmp_path / "out", config=PLAN, vae=vae)
    left = {p.name for p in (tmp_path / "out").iterdir()}
    assert left == {"plan.json", "prepare.lock", "shard-000000.tar", "shard-000000.json"}
    monkeypatch.setattr(datasets.Sink, "write", real)
    prepare(sources, tmp_path / "out", config=PLAN, vae=vae)
    assert shards(tmp_path / "out") == shards(data)


def test_a_flipped_bit_is_found_when_the_clip_is_read(data, tmp_path):
    rng = random.Random(0)
    whole = ShardDataset(data)
    for trial in range(5):
        shutil.copytree(data, tmp_path / str(trial))
        row = rng.choice(whole.rows)
        path = tmp_path / str(trial) / whole.files[row["shard"]].name
        content = bytearray(path.read_bytes())
        content[row["offset"] + rng.randrange(row["bytes"])] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        spoilt = ShardDataset(tmp_path / str(trial))
        with pytest.raises(ValueError, match="is damaged at"):
            spoilt.batch([whole.rows.index(row)])


def entries(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


@pytest.mark.parametrize("where", ["", ".", "shards", "a/b", "../films", "../link/shards"])
def test_no_shard_is_written_among_the_films(where, films, vae, tmp_path, monkeypatch):
    shutil.copytree(films, folder := tmp_path / "films")
    (tmp_path / "link").symlink_to(folder)
    before = entries(tmp_path)
    for source in (folder, str(folder), folder_sources(folder), folder_sources(tmp_path / "link")):
        with pytest.raises(ValueError, match="out must lie outside the folder") as error:
            prepare(source, folder / where, config=PLAN, vae=vae)
        assert str(folder / where) in str(error.value) and "\n" not in str(error.value)
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match="out must lie outside the folder"):
        prepare(".", where or ".", config=PLAN, vae=vae)
    assert entries(tmp_path) == before


def test_lists_do_not_let_shards_among_the_films_either(films, tmp_path):
    (tmp_path / "films").mkdir()
    (tmp_path / "films" / "P01_11.MP4").touch()
    lists = tmp_path / "EPIC_Sounds_train.csv"
    lists.write_text(EPIC_HEAD + "P01_11_0,P01,P01_11,,,0,48000,click,click,9\n")
    found = epic_sources(tmp_path / "films", lists, clip=SPEC)
    with pytest.raises(ValueError, match="out must lie outside the folder"):
        prepare(found, tmp_path / "films" / "out", config=PLAN)


FOREIGN = {  # what lies there -> whether prepare may write beside it
    "nothing": ((), True),
    "only the lock of a killed run": (("prepare.lock",), True),
    "lock and a half written plan": (("prepare.lock", "plan.json.0-1-abcd.partial"), True),
    "a film": (("a.mp4",), False),
    "somebody's plan.json": (("plan.json",), False),
    "a hidden file": ((".git",), False),
    "somebody's shards": (("shard-000000.tar",), False),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_folder_that_something_else_has_filled_is_refused(name, films, data, vae, tmp_path):
    names, allowed = FOREIGN[name]
    (out := tmp_path / "out").mkdir()
    for file in names:
        (out / file).touch()
    if allowed:
        prepare(folder_sources(films, test_share=0.0), out, config=PLAN, vae=vae)
        left = {k: v for k, v in shards(out).items() if not k.endswith(".partial")}
        assert left == shards(data)
    else:
        with pytest.raises(ValueError, match="out must be a new or empty folder") as error:
            prepare(folder_sources(films, test_share=0.0), out, config=PLAN, vae=vae)
        assert "\n" not in (text := str(error.value)) and names[0] in text and str(out) in text
        assert entries(out) == set(names)


def test_a_copy_without_its_lock_and_one_begun_among_the_films_go_on(films, data, vae, tmp_path):
    shutil.copytree(films, tmp_path / "films")
    sources = folder_sources(films, test_share=0.0)
    for out in (tmp_path / "copy", tmp_path / "films" / "shards"):
        shutil.copytree(data, out)
        (out / "prepare.lock").unlink()
        (out / "shard-000001.json").unlink()
        (out / "index.json").unlink()
        prepare(replace(sources, folders=(str(tmp_path / "films"),)), out, config=PLAN, vae=vae)
        assert shards(out) == shards(data)


def damaged(data, out, k=1):
    "A copy with one bit flipped in the first clip of a shard of several."
    shutil.copytree(data, out)
    row = get_json(data / f"shard-{k:06d}.json")["clips"][0]
    content = bytearray((path := out / f"shard-{k:06d}.tar").read_bytes())
    content[row["offset"] + row["bytes"] // 2] ^= 1
    path.write_bytes(content)
    return row["id"]


def test_every_damage_is_found_beforehand_and_the_named_file_is_the_one(films, data, vae, tmp_path):
    seen, out = [], tmp_path / "out"
    assert verify_dataset(data, on_clip=seen.append) == []
    assert seen == [row["id"] for row in get_json(data / "index.json")["clips"]]
    name = damaged(data, out)
    os.truncate(out / "shard-000000.tar", 9_000)
    (out / "shard-000002.tar").unlink()
    told = verify_dataset(out)
    assert len(told) == 3 and all("\n" not in line for line in told)
    assert "shard-000000.tar is missing or not" in told[0] and "shard-000002.tar" in told[1]
    assert f"shard-000001.tar is damaged at {name}: delete shard-000001.json" in told[2]
    sources = folder_sources(films, test_share=0.0)
    (out / "shard-000001.json").unlink()
    prepare(sources, out, config=PLAN, vae=vae)
    assert verify_dataset(out) == [] and shards(out) == shards(data)


def test_damage_in_any_split_is_found(films, vae, tmp_path):
    first, *others = folder_sources(films, test_share=0.0)
    sources = [first, *(replace(s, split="test") for s in others)]
    prepare(sources, tmp_path / "data", config=PLAN, vae=vae)
    name = damaged(tmp_path / "data", tmp_path / "out", k=2)
    ShardDataset(tmp_path / "out").batch(range(2))
    (told,) = verify_dataset(tmp_path / "out")
    assert name in told


def test_what_is_no_prepared_folder_cannot_be_verified(films, data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "index.json").write_text("{")
    for folder, why in (
        (films, "holds no prepared data"),
        (tmp_path / "data", "is damaged or was"),
    ):
        with pytest.raises(ValueError, match=why):
            verify_dataset(folder)


SPOIL = {
    "a value edited": lambda text: text.replace('"split": "train"', '"split": "test"', 1),
    "a digit of the mean": lambda text: re.sub(r'("mel": \[\s*-\d\.)\d', r"\g<1>0", text),
    "cut short": lambda text: text[: len(text) // 2],
    "emptied": lambda text: "",
    "no JSON": lambda text: "hello",
    "a list": lambda text: "[1]",
    "without its seal": lambda text: text.replace('"seal"', '"deal"'),
}


@pytest.mark.parametrize("name", SPOIL)
def test_a_damaged_index_is_named_and_the_same_prepare_repairs_it(name, films, data, vae, tmp_path):
    shutil.copytree(data, out := tmp_path / "out")
    text = (path := out / "index.json").read_text()
    assert SPOIL[name](text) != text
    path.write_text(SPOIL[name](text))
    for reader in (open_dataset, verify_dataset):
        with pytest.raises(
            ValueError, match=r"index.json is damaged or was edited \(its seal"
        ) as e:
            reader(out)
        assert "run the same prepare again" in str(e.value) and "not finished" not in str(e.value)
    seen, sources = [], folder_sources(films, test_share=0.0)
    prepare(sources, out, config=PLAN, vae=vae, on_source=lambda *x: seen.append(x))
    assert not seen and shards(out) == shards(data)
    path.unlink()
    with pytest.raises(ValueError, match="its preparation was not finished: run the same prepare"):
        open_dataset(out)


def test_links_to_folders_are_named_and_do_no_harm(films, vae, tmp_path):
    (tmp_path / "in").mkdir()
    shutil.copy(sorted(films.iterdir())[0], tmp_path / "in" / "a.mp4")
    shutil.copytree(films, tmp_path / "elsewhere")
    for name, target in {
        "dirlink": tmp_path / "elsewhere",
        "deep.mp4": tmp_path / "elsewhere",
        "circle": ".",
        "up": "..",
        "itself": "itself",
    }.items():
        (tmp_path / "in" / name).symlink_to(target)
    wanted = dict.fromkeys(("deep.mp4", "dirlink", "up"), "a link to a folder; give it as SRC")
    found = folder_sources(tmp_path / "in", test_share=0.0)
    assert found.missing == wanted and [s.id for s in found] == ["a.mp4"]
    for source, out in ((tmp_path / "in", "one"), (found, "two")):
        report = prepare(source, tmp_path / out, config=PLAN, vae=vae)
        told = json.loads((tmp_path / out / "report.json").read_text())
        assert told["missing"] == wanted and report.n_read == 1 and not report.skipped
    lists = tmp_path / "EPIC_Sounds_train.csv"
    lists.write_text(EPIC_HEAD)
    assert "dirlink" in epic_sources(tmp_path / "in", lists, clip=SPEC).missing


def test_a_source_that_is_a_file_or_empty_is_told_so(films, tmp_path):
    film, lists = next(films.iterdir()), tmp_path / "EPIC_Sounds_train.csv"
    lists.write_text(EPIC_HEAD)
    for look in (folder_sources, lambda x: epic_sources(x, lists, clip=SPEC)):
        with pytest.raises(NotADirectoryError, match=r"\.mp4' is a file, not a folder"):
            look(film)
        with pytest.raises(FileNotFoundError, match="there is no folder '.*nowhere'"):
            look(tmp_path / "nowhere")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "notes.txt").touch()
    for source in (tmp_path / "in", folder_sources(tmp_path / "in")):
        with pytest.raises(ValueError, match="at least one video file, got none in") as error:
            prepare(source, tmp_path / "out", config=PLAN)
        assert str(tmp_path / "in") in str(error.value) and ".mp4, .m4v, .mov" in str(error.value)
    (tmp_path / "in" / "link").symlink_to(films)
    with pytest.raises(ValueError, match="left out: link: a link to a folder"):
        prepare(tmp_path / "in", tmp_path / "out", config=PLAN)
    assert not (tmp_path / "out").exists()


def test_a_short_film_is_told_of_the_margin_where_that_helps(tmp_path):
    for name, n in (("fits", 22), ("never", 12)):
        make_film(tmp_path / f"{name}.mp4", n)
    fits, never = (Source(n, str(tmp_path / f"{n}.mp4")) for n in ("fits", "never"))
    with pytest.raises(MediaError, match=r"1\.40 s .*margin=0 \(--margin 0\) takes it"):
        read_cuts(fits, PLAN)
    bare = replace(PLAN, margin=0)
    assert len(read_cuts(fits, bare)) == 1
    with pytest.raises(MediaError, match="can be used") as error:
        read_cuts(never, PLAN)
    assert "margin" not in str(error.value)
    with pytest.raises(MediaError, match=r"1\.20 s can be used, a clip needs 1\.8$"):
        read_cuts(never, bare)


MEMORY = {
    "computer": MemoryError(),
    "GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has"),
    "allocator": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
    "driver": RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"),
    "cuDNN": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
}


@pytest.mark.parametrize("name", MEMORY)
def test_memory_that_is_short_is_told_in_one_line(name, monkeypatch):
    def full(*_):
        raise MEMORY[name]

    monkeypatch.setattr(datasets, "encode_cuts", full)
    monkeypatch.setattr(datasets, "read_cuts", full)
    for why in (
        datasets._try_encode([None], None, PLAN),
        datasets._try_cuts(Source("x", "x"), PLAN),
    ):
        assert why.startswith("out of memory: run the same prepare again") and "\n" not in why


def once_short(monkeypatch, where: str) -> None:
    "The second film of the next run finds the memory full."
    real, calls = getattr(datasets, where), []

    def short(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError
        return real(*arguments)

    monkeypatch.setattr(datasets, where, short)


@pytest.mark.parametrize("where", ["encode_cuts", "read_cuts"])
def test_a_film_for_which_memory_was_short_is_counted_and_tried_again(
    where, films, data, vae, tmp_path, monkeypatch
):
    once_short(monkeypatch, where)
    out, sources, tried = tmp_path / "out", folder_sources(films, test_share=0.0), []
    options = {"config": PLAN, "vae": vae, "workers": 1}
    report = prepare(sources, out, max_bad=0.5, **options)
    ((lost, why),) = report.skipped.items()
    assert why.startswith("out of memory: ") and report.n_read == 2
    report = prepare(sources, out, on_source=lambda s, _: tried.append(s.id), **options)
    assert tried == [lost] and not report.skipped and shards(out) == shards(data)


def test_the_index_is_of_the_shards_that_another_process_has_made_again(
    films, data, vae, tmp_path, monkeypatch
):
    once_short(monkeypatch, "encode_cuts")
    out, sources, others = tmp_path / "out", folder_sources(films, test_share=0.0), []

    def beside(source, why):
        if source.id == sources[-1].id and not others:
            others.append(1)
            prepare(sources, out, config=PLAN, vae=vae)

    report = prepare(sources, out, config=PLAN, vae=vae, workers=1, on_source=beside)
    assert others and not report.skipped and verify_dataset(out) == []
    assert shards(out) == shards(data)


def test_memory_that_is_always_short_is_no_success(films, vae, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(datasets, "encode_cuts", full)
    sources, out = folder_sources(films, test_share=0.0), tmp_path / "out"
    for most in (0.2, 1.0):
        with pytest.raises(ValueError, match="none of 3 files can be used; .* out of memory"):
            prepare(sources, out, config=PLAN, vae=vae, max_bad=most)
        assert not (out / "index.json").exists()
    ask = ["prepare", str(films), "--out", str(tmp_path / "cli"), "--config", "tiny"]
    assert cli.run([*ask, "--allow-bad"]) == 1 and "out of memory" in capsys.readouterr().err


def test_a_mistake_while_encoding_is_not_blamed_on_the_films(films, vae, tmp_path, monkeypatch):
    def wrong(*_):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(datasets, "encode_cuts", wrong)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        prepare(folder_sources(films), tmp_path / "out", config=PLAN, vae=vae)


def test_nothing_at_the_path_is_told_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder or file '.*nodir'"):
        open_dataset(tmp_path / "nodir")


def changed(key, value):
    "Another value somewhere in an index: `key` is a path like 'clips.0.bytes'."

    def change(about):
        *path, last = [int(k) if k.isdigit() else k for k in key.split(".")]
        part = about
        for k in path:
            part = part[k]
        part[last] = value
        return about

    return change


OUTSIDE = ("../secret.tar", "/etc/passwd", "shard-000000.tar/../../x", "shard-999999.tar", 7, None)
HOSTILE = {
    **{f"file {name!r}": changed("shards.0.file", name) for name in OUTSIDE},
    **{
        f"bytes {n}": changed("clips.0.bytes", n)
        for n in (0, -1, 2**28 + 1, 10**18, 1.5, "9", None)
    },
    **{f"offset {n}": changed("clips.0.offset", n) for n in (-512, 10**12, 10**30, 0.5, [])},
    **{f"shard {n}": changed("clips.0.shard", n) for n in (-1, 99, 2**70, "0", None, True + 0.5)},
    **{
        f"mel {x}": changed("mel", x) for x in ([0, 0], [float("nan"), 1], [0], 5, ["a", "b"], None)
    },
    **{f"split {x!r}": changed("clips.0.split", x) for x in ("dev", None, ["train"])},
    **{f"clip size {x}": changed("config.clip.n_frames", x) for x in (0, -1, "18", 1e9)},
    **{f"margin {x}": changed("config.margin", x) for x in (-1, 10**9, "4", None)},
    "unknown clip size": changed("config.clip.eval", 1),
    "format": changed("format", 7),
    "format of lines": changed("format", "1\n\x1b[2J"),
    "one name twice": lambda about: {**about, "clips": about["clips"] + about["clips"][:1]},
    "no clips": lambda about: {**about, "clips": []},
    "clips of numbers": lambda about: {**about, "clips": [1, 2]},
    "no shards": lambda about: {**about, "shards": []},
    "no config": lambda about: {k: v for k, v in about.items() if k != "config"},
    "name of a number": changed("clips.0.id", 5),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_an_index_of_a_stranger_reads_nothing_outside(name, data, tmp_path):
    (tmp_path / "data").mkdir()
    for path in data.iterdir():
        os.link(path, tmp_path / "data" / path.name)
    about = get_json(data / "index.json")
    put_json(tmp_path / "data" / "index.json", HOSTILE[name](about))
    with pytest.raises(ValueError) as error:
        ShardDataset(tmp_path / "data")
    assert "\n" not in (text := str(error.value)) and len(text) < 600 and text.isprintable()


def hostile_tar(path: Path, outside: Path) -> None:
    "Every member that an unpacker can be hurt by."
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name in ("../up.txt", str(outside / "abs.txt"), "a/../../up.txt", "twice", "twice"):
            datasets._add(tar, name, b"x" * 600)
        for name, kind in (("link", tarfile.SYMTYPE), ("hard", tarfile.LNKTYPE), ("n", b"3")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, str(outside / "secret")
            tar.addfile(member)
        sparse = tarfile.TarInfo("sparse")
        sparse.type, sparse.size = tarfile.GNUTYPE_SPARSE, 0
        tar.addfile(sparse)
        huge = tarfile.TarInfo("huge")
        huge.size = 10**15
        tar.fileobj.write(huge.tobuf(tarfile.GNU_FORMAT))


def test_a_hostile_tar_is_never_unpacked(data, tmp_path):
    outside, place = tmp_path / "outside", tmp_path / "in" / "data"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret" * 200)
    shutil.copytree(data, place)
    hostile_tar(place / "shard-000000.tar", outside)
    content = (place / "shard-000000.tar").read_bytes()
    about = get_json(place / "index.json")
    about["shards"][0]["bytes"] = len(content)
    kept = sorted(p for p in tmp_path.rglob("*"))
    for first in range(0, len(content) - 600, 512):  # a right hash does not make it a clip
        wanted = hashlib.sha256(content[first : first + 600]).hexdigest()
        about["clips"] = [{**about["clips"][0], "offset": first, "bytes": 600, "sha256": wanted}]
        put_json(place / "index.json", about)
        with pytest.raises(ValueError, match="holds no tensors at") as error:
            ShardDataset(place).batch([0])
        assert "\n" not in str(error.value) and "secret" not in str(error.value)
    assert sorted(p for p in tmp_path.rglob("*")) == kept
    assert (outside / "secret").read_bytes() == b"secret" * 200


WRONG = {
    "no mel": {"mel": None},
    "NaN": {"video": torch.full((26, 4, 8, 8), float("nan")).half()},
    "another size": {"sound": torch.zeros(7)},
    "whole numbers": {"mel": torch.zeros(80, 112, dtype=torch.int32)},
}


@pytest.mark.parametrize("name", WRONG)
def test_a_clip_with_the_right_hash_and_the_wrong_content_is_refused(name, data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    place, about = tmp_path / "data", get_json(data / "index.json")
    tensors = {**ShardDataset(data).tensors(0), **WRONG[name]}
    row = about["clips"][0]
    with datasets.whole_file(place / "shard-000000.tar") as file:
        with tarfile.open(fileobj=file, mode="w") as tar:
            tensors = {k: x for k, x in tensors.items() if x is not None}
            row = {**datasets._add_clip(tar, "x", row, tensors), "shard": 0}
    about["shards"][0]["bytes"], about["clips"] = file.size, [row]
    put_json(place / "index.json", about)
    with pytest.raises(ValueError, match="is not of .* finite numbers"):
        ShardDataset(place).batch([0])


@pytest.mark.parametrize(
    "name", ["plan.json", "index.json", "report.json", "shard-000000.json", "shard-000000.tar"]
)
def test_links_in_the_folder_are_replaced_not_followed(name, data, films, vae, tmp_path):
    shutil.copytree(data, tmp_path / "out")
    for secret in (tmp_path / "secret", tmp_path / "nothing"):
        (tmp_path / "out" / name).unlink()
        (tmp_path / "out" / name).symlink_to(secret)
        if secret.name == "secret":
            secret.write_bytes((data / name).read_bytes())
        if name == "plan.json":
            with pytest.raises(ValueError, match="shards without a plan"):
                prepare(
                    folder_sources(films, test_share=0.0), tmp_path / "out", config=PLAN, vae=vae
                )
        else:
            prepare(folder_sources(films, test_share=0.0), tmp_path / "out", config=PLAN, vae=vae)
            assert shards(tmp_path / "out") == shards(data)
            assert not (tmp_path / "out" / name).is_symlink()
    assert (tmp_path / "secret").read_bytes() == (data / name).read_bytes()
    assert not (tmp_path / "nothing").exists()


def test_a_lock_file_that_is_a_link_is_refused(films, vae, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "prepare.lock").symlink_to(tmp_path / "outside")
    with pytest.raises(OSError, match="prepare.lock: cannot be opened"):
        prepare(folder_sources(films, test_share=0.0), tmp_path / "out", config=PLAN, vae=vae)
    assert not (tmp_path / "outside").exists()


@pytest.mark.parametrize("change", [{"config": [1]}, {"config": 5, "n": None}, {"format": 2}])
def test_a_plan_of_a_stranger_is_refused_in_one_line(change, data, films, vae, tmp_path):
    shutil.copytree(data, tmp_path / "out")
    put_json(tmp_path / "out" / "plan.json", {**get_json(data / "plan.json"), **change})
    with pytest.raises(ValueError, match="was begun with other settings") as error:
        prepare(folder_sources(films, test_share=0.0), tmp_path / "out", config=PLAN, vae=vae)
    assert "\n" not in str(error.value)


def test_a_forged_shard_index_is_done_again(data, films, vae, tmp_path):
    sources, seen = folder_sources(films, test_share=0.0), []
    for change in (
        {"file": "../x.tar"},
        {"bytes": "9"},
        {"clips": 5},
        {"clips": [{}]},
        {"plan": 0},
    ):
        shutil.copytree(data, out := tmp_path / str(len(seen)))
        put_json(out / "shard-000001.json", {**get_json(data / "shard-000001.json"), **change})
        prepare(sources, out, config=PLAN, vae=vae, on_source=lambda *x: seen.append(x))
        assert shards(out) == shards(data)
    assert len(seen) == 5


def test_shards_that_are_links_are_not_followed(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    shard = tmp_path / "data" / "shard-000000.tar"
    shard.unlink()
    shard.symlink_to(data / "shard-000000.tar")
    with pytest.raises(ValueError, match="missing or not"):
        ShardDataset(tmp_path / "data")


@pytest.mark.parametrize("workers", (0, 2))
def test_training_on_shards_resumes_exactly_with_true_neighbouring_sound(data, tmp_path, workers):
    dataset = open_dataset(data)
    config = TrainConfig.tiny(
        steps=4, warmup_steps=1, batch_size=2, save_every=2, log_every=1, num_workers=workers
    )
    sizes = UNetConfig.tiny(
        clip=dataset.clip, vae="tiny", mel_mean=dataset.mel_mean, mel_std=dataset.mel_std
    )
    loss = ContrastiveLossFn(ContrastiveConfig(0.01))

    def run(**options):
        return train(new_model(sizes), dataset, loss_fn=loss, device="cpu", **options)

    whole = run(config=config, out_dir=tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for path in (tmp_path / "again").glob("step_*4"):
        shutil.rmtree(path)
    assert same(whole, run(config=config, out_dir=tmp_path / "again", resume=True))


def test_training_refuses_other_data(data, films, vae, tmp_path):
    dataset = ShardDataset(data)
    other = tmp_path / "other"
    prepare(folder_sources(films, test_share=0.0), other, config=replace(PLAN, stride=18), vae=vae)
    config = TrainConfig.tiny(steps=2, warmup_steps=1, batch_size=1, save_every=1)
    sizes = UNetConfig.tiny(clip=SPEC, vae="tiny")
    train(new_model(sizes), dataset, config=config, out_dir=tmp_path / "run", device="cpu")
    with pytest.raises(Exception, match="is of another run: .*data"):
        train(
            new_model(sizes),
            ShardDataset(other),
            config=replace(config, steps=3),
            out_dir=tmp_path / "run",
            resume=True,
            device="cpu",
        )


@given(st.integers(0, 5000), st.integers(1, 40), st.integers(1, 50))
def test_clips_lie_inside_ascend_and_are_not_too_many(n_frames, stride, most):
    config = PrepareConfig(clip=SPEC, stride=stride, max_clips=most)
    starts = clip_starts(n_frames, config)
    assert starts == sorted(set(starts)) and len(starts) <= most
    assert all(0 <= s and s + 18 <= n_frames for s in starts)
    assert bool(starts) == (n_frames >= 18)


def test_a_list_of_sources_says_what_is_missing(data, films, vae, tmp_path):
    listing = SourceList(tuple(folder_sources(films, test_share=0.0)), {"P09": "no such video"})
    prepare(listing, tmp_path / "out", config=PLAN, vae=vae)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["missing"] == listing.missing
    with pytest.raises(ValueError, match="at least one video"):
        prepare([], tmp_path / "none", config=PLAN, vae=vae)
    with pytest.raises(ValueError, match="split must be one of"):
        Source("x", "x.mp4", split="dev")


@pytest.fixture(scope="module")
def official_aist():
    if not (REAL / "annotations" / "aistpp").is_dir():
        pytest.skip("no official lists beside the checkout")
    return REAL / "annotations" / "aistpp"


def test_the_official_aist_splits(official_aist, tmp_path):
    names = [line for file in official_aist.glob("*.txt") for line in file.read_text().split()]
    for name in set(names):
        (tmp_path / f"{name.replace('cAll', 'c01')}.mp4").touch()
    found = aist_sources(tmp_path, official_aist)
    parts = {s: [x for x in found.sources if x.split == s] for s in ("train", "test")}
    assert {s: len(x) for s, x in parts.items()} == {"train": 952, "test": 20}
    ignored = [why for why in found.missing.values() if "ignore" in why]
    assert len(ignored) == len(set((official_aist / "ignore_list.txt").read_text().split()))
    songs, dances = (
        {s: {f(parse_aist(x.id)) for x in part} for s, part in parts.items()}
        for f in (lambda n: n.music, lambda n: n.dance)
    )
    assert songs["train"].isdisjoint(songs["test"]) and dances["train"].isdisjoint(dances["test"])
    assert {x.about["tempo"] for x in found.sources} <= set(range(80, 136, 5))


def test_the_official_epic_sounds_list(tmp_path):
    path = REAL / "annotations" / "epic_sounds" / "EPIC_Sounds_validation.csv"
    if not path.is_file():
        pytest.skip("no official list beside the checkout")
    (tmp_path / "P01_11.MP4").touch()
    found = epic_sources(tmp_path, path, clip=SPEC)
    absent = [int(w.split("(")[1].split()[0]) for w in found.missing.values() if "no such" in w]
    rows = path.read_text().count("\n") - 1
    assert len(found.sources) + sum(absent) == rows and len(found.sources) > 20
    assert all(s.split == "validation" and s.stop - s.start >= 1.8 for s in found.sources)
    first = found.sources[0]
    assert first.about["annotated"] == [49_656 / 24_000, 71_832 / 24_000]


def test_films_under_official_aist_names_keep_their_split(official_aist, films, vae, tmp_path):
    place = tmp_path / "films"
    place.mkdir()
    lists = {p.stem: p.read_text().split() for p in official_aist.glob("*.txt")}
    ignored = set(lists["ignore_list"])
    names = {"train": next(n for n in lists["crossmodal_train"] if n not in ignored)}
    names |= {"test": lists["crossmodal_test"][0], "ignored": lists["ignore_list"][0]}
    for name in names.values():
        shutil.copy(next(films.iterdir()), place / f"{name.replace('cAll', 'c02')}.mp4")
    found = aist_sources(place, official_aist)
    prepare(found, tmp_path / "out", config=PLAN, vae=vae)
    for split in ("train", "test"):
        rows, parsed = ShardDataset(tmp_path / "out", split).rows, parse_aist(names[split])
        assert {r["source"] for r in rows} == {names[split].replace("cAll", "c02")}
        assert {(r["music"], r["tempo"]) for r in rows} == {(parsed.music, parsed.tempo)}
    told = json.loads((tmp_path / "out" / "report.json").read_text())["missing"]
    assert "ignore list" in told[names["ignored"].replace("cAll", "c02")]


def kitchen_film(path: Path, fps: Fraction, rate: int, at: float) -> None:
    "Black and silent, but for one white picture and a click from second `at` on."
    with av.open(str(path), "w", format="mp4") as box:
        video = box.add_stream("libx264", rate=fps)
        video.width, video.height, video.pix_fmt = 96, 64, "yuv420p"
        audio = box.add_stream("aac", rate=rate, layout="stereo")
        for i in range(round(6 * fps)):
            white = at <= i / fps < at + 0.1
            frame = av.VideoFrame.from_ndarray(
                np.full((64, 96, 3), 255 * white, np.uint8), format="rgb24"
            )
            frame.pts, frame.time_base = i, 1 / fps
            box.mux(video.encode(frame))
        wave = np.zeros((2, 6 * rate), np.float32)
        wave[:, round(at * rate) : round((at + 0.02) * rate)] = 0.8
        frame = av.AudioFrame.from_ndarray(wave, "fltp", "stereo")
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        for packet in (*audio.encode(frame), *audio.encode(None), *video.encode(None)):
            box.mux(packet)


EPIC_HEAD = (
    "annotation_id,participant_id,video_id,start_timestamp,stop_timestamp,start_sample,"
    "stop_sample,description,class,class_id\n"
)
RATES = ((Fraction(30_000, 1001), 24_000), (Fraction(60_000, 1001), 48_000), (Fraction(90), 44_100))


@pytest.mark.parametrize("fps,rate", RATES, ids=["29.97", "59.94", "90"])
def test_epic_times_meet_picture_and_sound_at_native_rates(fps, rate, vae, tmp_path):
    at = 3.2  # s: sample 76,800 of the list's 24 kHz
    place = tmp_path / "films"
    place.mkdir()
    kitchen_film(place / "P01_11.MP4", fps, rate, at)
    start, stop = 24_000 * at, 24_000 * (at + 0.2)
    row = f"P01_11_0,P01,P01_11,,,{start:.0f},{stop:.0f},click,click,9\n"
    lists = tmp_path / "EPIC_Sounds_train.csv"
    lists.write_text(EPIC_HEAD + row)
    found = epic_sources(place, lists, clip=SPEC)
    (cut,) = read_cuts(found.sources[0], PLAN)
    first = cut.start - PLAN.margin / SPEC.fps
    bright = cut.video.float().mean((1, 2, 3))
    assert abs(first + int(bright.argmax()) / SPEC.fps - at) <= 0.1 and bright.max() > 200
    heard = first + int((cut.waveform.abs() > 0.3).nonzero()[0]) / SPEC.sample_rate
    assert abs(heard - at) < 0.005
    prepare(found, tmp_path / "out", config=PLAN, vae=vae)
    (kept,) = ShardDataset(tmp_path / "out").rows
    assert kept["class"] == "click" and kept["annotated"] == pytest.approx([at, at + 0.2])


@needs_real
@pytest.mark.slow
def test_all_real_videos_are_accounted_for(vae, tmp_path):
    files = {p.name for p in (REAL / "video").iterdir()}
    sources = folder_sources(REAL / "video")
    report = prepare(
        sources, tmp_path, config=PrepareConfig(clip=SPEC, vae="tiny"), vae=vae, max_bad=1.0
    )
    used = {row["source"] for s in ("train", "test") for row in split_rows(tmp_path, s)}
    assert len(files) == 30 and used | set(report.skipped) == files and len(report.skipped) == 6


def split_rows(folder, split):
    return [row for row in get_json(folder / "index.json")["clips"] if row["split"] == split]


SMALL = PrepareConfig(clip=ClipSpec(frame_size=16, n_frames=5), vae="tiny", margin=0)
HELD = """
import os, sys
def held():  # MiB of this process that are no file's, and its open files
    with open("/proc/self/status") as file:
        lines = dict(line.split(":", 1) for line in file)
    return int(lines["RssAnon"].split()[0]) / 1024, len(os.listdir("/proc/self/fd"))
"""
READ = """
import torch
from cmmd.datasets import ShardDataset
from cmmd.train import StepData, TrainConfig
torch.set_num_threads(1)
data, steps = ShardDataset(sys.argv[1]), int(sys.argv[2]) // 8
loader = StepData(data, TrainConfig(), num_train_steps=1000).loader(0, steps)
for step, batches in enumerate(loader):
    if step == steps // 5: before = held()
print(len(data), *before, *held())
"""
WRITE = """
import torch
from cmmd import datasets
from cmmd.datasets import Cut, PrepareConfig, Source, prepare
from cmmd.latents import load_vae
def read_cuts(source, config):  # 64 clips of the paper's size
    return [Cut(k, torch.zeros(1, dtype=torch.uint8), torch.zeros(1)) for k in range(64)]
def encode_cuts(cuts, vae, config):
    return [{"video": torch.ones(config.window.video_shape).half(),
             "mel": torch.ones(config.clip.audio_shape), "sound": torch.ones(41_600)} for _ in cuts]
datasets.read_cuts, datasets.encode_cuts = read_cuts, encode_cuts
vae, n = load_vae("tiny"), int(sys.argv[2])
before = held()
def watch(*_): most[0] = max(most[0], held()[0])
most = [0]
sources = [Source(f"{i:02d}", "x") for i in range(n)]
prepare(sources, sys.argv[1], vae=vae, on_source=watch, workers=1)
print(n * 64, before[0], most[0])
"""


def told(program: str, *arguments) -> list[float]:
    done = subprocess.run(
        [sys.executable, "-c", HELD + program, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return [float(x) for x in done.stdout.split()]


def many_clips(folder: Path, n: int, vae, monkeypatch) -> None:
    "A folder of so many small clips; what decodes and encodes is left out."
    clip = SMALL.clip

    def read_cuts(source, config):
        return [datasets.Cut(k, torch.zeros(0), torch.zeros(0)) for k in range(50)]

    def encode_cuts(cuts, vae, config):
        video, mel = (torch.randn(len(cuts), *x) for x in (clip.video_shape, clip.audio_shape))
        return [{"video": v.clone(), "mel": m.clone()} for v, m in zip(video, mel)]

    monkeypatch.setattr(datasets, "read_cuts", read_cuts)
    monkeypatch.setattr(datasets, "encode_cuts", encode_cuts)
    prepare([Source(f"{i:04d}", "x") for i in range(n // 50)], folder, config=SMALL, vae=vae)


@pytest.mark.parametrize("n", (1_000, pytest.param(10_000, marks=pytest.mark.slow)))
def test_the_loader_needs_the_same_memory_and_files_however_much_it_reads(
    n, vae, tmp_path, monkeypatch
):
    many_clips(tmp_path / "data", n, vae, monkeypatch)
    clips, before, files, after, still = told(READ, tmp_path / "data", n)
    assert clips == n and len(list((tmp_path / "data").glob("*.tar"))) == -(-n // 800)
    assert after - before < 8 and still == files, (before, after, files, still)


@pytest.mark.parametrize("n", (4, pytest.param(16, marks=pytest.mark.slow)))
def test_a_shard_is_written_without_being_held_in_memory(n, tmp_path):
    clips, before, most = told(WRITE, tmp_path / "data", n)
    shard = (tmp_path / "data" / "shard-000000.tar").stat().st_size / 2**20
    assert shard > 15 * n and most - before < 45, (shard, before, most)


def test_memory_does_not_grow_with_the_data(data):
    program = (
        "import resource, sys\n"
        "from cmmd.datasets import ShardDataset\n"
        "data = ShardDataset(sys.argv[1])\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "for i in range(100): data.batch([i % len(data)] * 4)\n"
        "before = peak()\n"
        "for i in range(500): data.batch([(7 * i + k) % len(data) for k in range(4)])\n"
        "print(peak() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, data], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 30, "MiB over 2,000 clips"
