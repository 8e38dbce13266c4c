"""Preparing data: all files accounted for, a kill costs one shard, damage is found when read."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import same

from cmmd import datasets
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
)
from cmmd.evaluate import stored_material
from cmmd.latents import load_vae
from cmmd.media import write_clip
from cmmd.mel import griffin_lim
from cmmd.pipeline import new_model
from cmmd.sources import aist_sources, epic_sources, parse_aist
from cmmd.toy import make_clips
from cmmd.train import TrainConfig, train
from cmmd.unet import UNetConfig

REAL = Path(__file__).resolve().parents[2] / "shared" / "real"
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


def bad_files(folder: Path, good: Path) -> set[str]:
    "Files of which no clip can be made, each for another reason."
    content, long = good.read_bytes(), SPEC.with_frames(50)
    clip = make_clips(1, spec=long, seed=11)
    (folder / "zero.mp4").write_bytes(b"")
    (folder / "truncated.mp4").write_bytes(content[: len(content) // 3])
    (folder / "text.mp4").write_text("this is no film")
    shutil.copy(sys.executable, folder / "program.mkv")
    write_clip(folder / "mute.mp4", clip.video[0], None, spec=long)
    write_clip(folder / "silent.mp4", clip.video[0], 0 * clip.waveform[0], spec=long)
    write_clip(folder / "one_frame.mp4", clip.video[0, :1], clip.waveform[0, :1600], spec=long)
    (folder / "loop.mp4").symlink_to(folder / "loop.mp4")
    (folder / "folder.mp4").mkdir()
    (folder / "dangling.mp4").symlink_to(folder / "nowhere.mp4")
    names = "zero truncated text mute silent one_frame loop dangling".split()
    return {f"{n}.mp4" for n in names} | {"program.mkv"}


def test_every_bad_file_is_named_and_the_good_ones_are_kept(films, vae, tmp_path):
    shutil.copytree(films, tmp_path / "in")
    good = sorted(p.name for p in films.iterdir())
    bad = bad_files(tmp_path / "in", films / good[0])
    sources = folder_sources(tmp_path / "in", test_share=0.0)
    report = prepare(sources, tmp_path / "out", config=PLAN, vae=vae, max_bad=1.0)
    assert set(report.skipped) == bad and report.n_read == len(good)
    assert all(why and "\n" not in why for why in report.skipped.values())
    assert json.loads((tmp_path / "out" / "report.json").read_text())["skipped"] == report.skipped
    assert {row["source"] for row in ShardDataset(tmp_path / "out").rows} == set(good)
    with pytest.raises(ValueError, match="cannot be used"):
        prepare(sources, tmp_path / "out", config=PLAN, vae=vae, max_bad=0.2)


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


def test_a_full_disk_is_one_line_and_the_run_goes_on(films, data, vae, tmp_path, monkeypatch):
    def full(path, content):
        if path.suffix == ".tar" and path.stem.endswith("1"):
            with datasets.writing(path, len(content)):
                raise OSError(28, "No space left on device")
        real(path, content)

    real, sources = datasets.put_file, folder_sources(films, test_share=0.0)
    monkeypatch.setattr(datasets, "put_file", full)
    with pytest.raises(OSError, match=r"shard-000001.tar: cannot write [\d,]+ bytes"):
        prepare(sources, tmp_path / "out", config=PLAN, vae=vae)
    assert not (tmp_path / "out" / "index.json").exists()
    monkeypatch.setattr(datasets, "put_file", real)
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


HOSTILE = {
    "format": {"format": 7},
    "path": {"shards": [{"file": "../secret.tar", "bytes": 10, "sha256": "0"}]},
    "absolute": {"shards": [{"file": "/etc/passwd", "bytes": 10, "sha256": "0"}]},
    "absent": {"shards": [{"file": "shard-999999.tar", "bytes": 10, "sha256": "0"}]},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_an_index_of_a_stranger_reads_nothing_outside(name, data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    about = get_json(tmp_path / "data" / "index.json")
    put_json(tmp_path / "data" / "index.json", {**about, **HOSTILE[name]})
    with pytest.raises(ValueError) as error:
        ShardDataset(tmp_path / "data")
    assert "\n" not in str(error.value)


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
