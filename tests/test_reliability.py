"""What a long run must survive, through the real trainer and the real commands.

test_checkpoint.py asks the same of one save, test_train.py of single stops, test_prepare.py
of data.
"""

import hashlib
import io
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import tokenize
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import lines, same, weights
from test_frechet import clap_folder  # noqa: F401
from project import ROOT
from test_train import DATA, Stop, bad_loss, config, fork, make_model, run, wait_for

from cmmd import checkpoint as ck
from cmmd import cli
from cmmd import train as tr
from cmmd.checkpoint import CheckpointError, find_checkpoint, list_checkpoints
from cmmd.core import ClipSpec, make_generator
from cmmd.datasets import (
    PrepareConfig,
    folder_sources,
    get_json,
    load_dataset,
    open_dataset,
    prepare,
    put_json,
    save_dataset,
    toy_dataset,
)
from cmmd.frechet import load_clap, load_i3d
from cmmd.guidance import generate
from cmmd.latents import load_vae
from cmmd.listening import load_study, read_answers, read_key
from cmmd.media import read_media, write_clip, write_wav
from cmmd.melgan import load_vocoder
from cmmd.pipeline import CMMDPipeline, load_model, load_start, new_model
from cmmd.recipes import load_recipe
from cmmd.soundbank import load_sounds
from cmmd.sources import aist_sources, epic_sources
from cmmd.toy import make_clips
from cmmd.train import Trainer, TrainError, joint_loss_fn, load_run, train
from cmmd.unet import UNetConfig


def digests(folder: Path) -> dict[str, str]:
    "SHA-256 of every file below a folder."
    files = [p for p in folder.rglob("*") if p.is_file()]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def state_of(trainer: Trainer) -> torch.Tensor:
    "All that a step could change: weights, Adam's moments, averages."
    moments = [
        x.flatten()
        for optimizer in trainer.optimizers.values()
        for values in optimizer.state.values()
        for x in values.values()
    ]
    averages = [x.flatten() for x in trainer.ema.shadow_params]
    return torch.cat([weights(trainer.model), *moments, *averages]).clone()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A run that nobody disturbed: its result, its folder, its configuration."
    c, folder = config(save_every=4), tmp_path_factory.mktemp("whole") / "run"
    return run(c, out_dir=folder), folder, c


# ---------------------------------------------------------------- row 1: kills
def killed_at(folder: Path, c, event: int) -> bool:
    "A run that is killed just before its event-th change to a file; whether it was."

    def work():
        count = [0]

        def deadly(*args):
            count[0] += 1
            if count[0] == event:
                os.kill(os.getpid(), signal.SIGKILL)

        def watch(name, args):
            path = str(args[0]) if args else ""
            writes = name == "open" and len(args) > 2 and args[2] & (os.O_WRONLY | os.O_RDWR)
            moves = name in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate")
            if (writes or moves) and str(folder) in path and "tensorboard" not in path:
                deadly()

        fsync = os.fsync
        os.fsync = lambda fd: (deadly(), fsync(fd))
        sys.addaudithook(watch)
        run(c, out_dir=folder, resume=folder.exists())

    return os.waitpid(fork(work), 0)[1] == signal.SIGKILL


def check_kills_at_events(tmp_path, whole, first: int, every: int) -> int:
    result, _, c = whole
    event, killed = first, True
    while killed:
        out = tmp_path / str(event)
        killed = killed_at(out, c, event)
        assert same(run(c, out_dir=out, resume=True), result), f"event {event}"
        assert not list(out.glob("*.tmp-*")), f"event {event}"
        event += every
    return event


def test_killed_at_events_of_a_run(tmp_path, whole, capfd):
    assert check_kills_at_events(tmp_path, whole, first=3, every=17) > 60


@pytest.mark.slow
def test_killed_at_every_event_of_a_run(tmp_path, whole, capfd):
    events = check_kills_at_events(tmp_path, whole, first=1, every=1)
    assert events > 60
    print(f"killed at each of {events - 2} events")


def train_command(out, *more) -> list[str]:
    "A tiny run of the real command."
    given = "--n-clips 2 --batch-size 1 --threads 1 --device cpu --save-every 1 --n-show 0".split()
    return ["train", "--out", str(out), *given, *map(str, more)]


def command(*arguments, **given):
    return subprocess.Popen(
        [sys.executable, "-c", "from cmmd.cli import main; main()", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **given,
    )


@pytest.mark.slow
@pytest.mark.parametrize("save_every", (400, 1))  # 1: hardly ever outside of saving and showing
def test_sigterm_saves_and_ends_the_command_within_10_s(tmp_path, save_every):
    out, steps = tmp_path / "run", ("--steps", 400, "--save-every", save_every, "--n-show", 2)
    process = command(*train_command(out, *steps), cwd=tmp_path)
    wait_for(out / "metrics.jsonl", 120)
    time.sleep(3)
    began = time.monotonic()
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - began < 10 and process.returncode == 130
    found = find_checkpoint(out)
    assert 0 < found.step < 400 and "--resume" in err.strip().splitlines()[-1]
    print(f"SIGTERM at step {found.step}: {time.monotonic() - began:.1f} s")


# ---------------------------------------------------------------- row 2: exact resume
def recorded(stop: int | None = None):
    "The usual loss, which notes what it sees of each step; and its notes."
    seen = {}

    def loss(model, batch):
        if batch.step == stop:
            raise Stop
        noted = (batch.t, batch.video_noise, batch.audio_noise, batch.video, batch.audio)
        digest = hashlib.sha256(repr(batch.ids).encode())
        for x in noted:
            digest.update(x.numpy().tobytes())
        seen[batch.step] = digest.hexdigest()
        return joint_loss_fn(model, batch)

    loss.__name__ = "joint_loss_fn"
    return loss, seen


def check_stop(out, stop: int, workers: int, whole):
    "Stop before a step, resume: order, noise, losses and weights are those of the whole run."
    c = config(steps=9, num_workers=workers, save_every=stop, log_every=1)
    result, everything = whole
    loss, first = recorded(stop)
    with pytest.raises(Stop):
        run(c, out_dir=out, loss_fn=loss)
    loss, later = recorded()
    resumed = run(c, out_dir=out, loss_fn=loss, resume=True)
    assert same(resumed, result), (stop, workers)
    assert first | later == everything and not first.keys() & later.keys()
    assert lines(tr.read_metrics(out / "metrics.jsonl")) == lines(result.history)


@pytest.fixture(scope="module")
def three_epochs():
    "9 steps of 4 clips out of 11, and what its loss saw."
    loss, seen = recorded()
    return run(config(steps=9, log_every=1), loss_fn=loss), seen


def test_order_and_noise_after_a_stop(tmp_path, three_epochs):
    for stop in (1, 6):
        check_stop(tmp_path / str(stop), stop, 0, three_epochs)


@pytest.mark.slow
@pytest.mark.parametrize("workers", (0, 2))
def test_stopped_at_every_step_of_three_epochs(tmp_path, three_epochs, workers):
    for stop in range(1, 9):
        check_stop(tmp_path / str(stop), stop, workers, three_epochs)


# ---------------------------------------------------------------- row 3: damage
def resealed(folder: Path, change) -> None:
    "Change a checkpoint's files and seal it again: every hash is right, the content is not."
    step = ck.read_manifest(folder)["step"]
    files = {name: (folder / name).read_bytes() for name in ck.read_manifest(folder)["files"]}
    about = json.loads(files["config.json"])
    change(files)
    shutil.rmtree(folder)
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / "manifest.json").write_bytes(ck.make_manifest(files, step=step, config=about))


GROUPS = ("model", "ema", "optimizer")
NEEDED = ("ema_updates", "sums", "bad_in_row", "skipped", "optimizer")  # since the first version


def change_tensors(folder, rng, kind: str) -> str:
    "Spoil one tensor and seal the checkpoint again."
    group = rng.choice(GROUPS)

    def change(files):
        tensors = ck.unpack_tensors(Path(group), files[f"{group}.safetensors"])
        name = rng.choice([n for n, x in tensors.items() if x.ndim])
        if kind == "nan":
            tensors[name].view(-1)[rng.randrange(tensors[name].numel())] = rng.choice(
                (math.nan, math.inf, -math.inf)
            )
        if kind == "shape":
            tensors[name] = tensors[name].repeat(2, *[1] * (tensors[name].ndim - 1))
        if kind == "lost":
            del tensors[name]
        files[f"{group}.safetensors"] = ck.tensors_to_bytes(tensors)

    resealed(folder, change)
    return f"{kind} in {group}"


def change_state(folder, rng, kind: str) -> str:
    "Lose a group or a part of the state and seal the checkpoint again."

    def change(files):
        state = json.loads(files["state.json"])
        if kind == "group":
            del files[f"{rng.choice(GROUPS)}.safetensors"]
        else:
            del state[rng.choice(NEEDED)]
            files["state.json"] = ck.to_json(state)

    resealed(folder, change)
    return f"{kind} lost"


def change_bytes(folder, rng, kind: str) -> str:
    "Spoil a file as a disk or a copy would."
    names = sorted(p.name for p in folder.iterdir())
    path = folder / (rng.choice(names) if kind != "empty" else "manifest.json")
    data = bytearray(path.read_bytes())
    if kind == "cut":
        data = data[: rng.randrange(len(data))]
    if kind == "bit":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    if kind == "empty":
        data = b""
    if kind == "swap":  # with another file, or with the same one of an earlier step
        others = [*folder.iterdir(), folder.parent / "step_00000008" / path.name]
        data = rng.choice([p for p in others if p != path]).read_bytes()
    path.unlink()
    if kind != "missing":
        path.write_bytes(data)
    return f"{kind} {path.name}"


DAMAGES = {
    **dict.fromkeys(("cut", "bit", "missing", "empty", "swap"), change_bytes),
    **dict.fromkeys(("nan", "shape", "lost"), change_tensors),
    **dict.fromkeys(("group", "state"), change_state),
}


def check_damages(tmp_path, whole, capfd, n: int, seed: int):
    _, sound, c = whole
    rng, step = random.Random(seed), "step_00000012"
    out = tmp_path / "run"
    shutil.copytree(sound, out)
    for i in range(n):
        kind = list(DAMAGES)[i % len(DAMAGES)]
        shutil.rmtree(out / step)
        shutil.copytree(sound / step, out / step)
        what = DAMAGES[kind](out / step, rng, kind)
        trainer = Trainer(make_model(), DATA, config=c, device="cpu")
        before = state_of(trainer)
        with pytest.raises(CheckpointError) as caught:  # --resume PATH
            load_run(trainer, out / step, exact=True)
        assert step in str(caught.value) and "\n" not in str(caught.value), what
        assert torch.equal(state_of(trainer), before) and trainer.step == 0, what
        capfd.readouterr()
        assert load_run(trainer, out) and trainer.step == 8, what  # --resume
        told = capfd.readouterr().err.strip().splitlines()
        assert len(told) == 1 and step in told[0] and "passed over" in told[0], (what, told)


def test_damages_are_found_before_any_weight_changes(tmp_path, whole, capfd):
    check_damages(tmp_path, whole, capfd, 30, seed=0)


@pytest.mark.slow
def test_200_damages_are_found_before_any_weight_changes(tmp_path, whole, capfd):
    check_damages(tmp_path, whole, capfd, 200, seed=1)


def test_never_again_from_nothing(tmp_path, whole):
    _, sound, c = whole
    shutil.copytree(sound, tmp_path / "run")
    for folder in list_checkpoints(tmp_path / "run"):
        resealed(folder, lambda files: files.pop("optimizer.safetensors"))
    before = digests(tmp_path / "run")
    with pytest.raises(CheckpointError, match="none of the 3"):
        run(c, out_dir=tmp_path / "run", resume=True)
    assert digests(tmp_path / "run") == before


# ---------------------------------------------------------------- row 4: full disks
class Broken:
    "A file whose k-th write, or whose closing, fails as on a full disk."

    def __init__(self, file, call: str):
        self.file, self.call = file, call

    def __enter__(self):
        return self

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        if self.call == "write":
            self.file.write(data[: len(data) // 2])
            raise OSError(28, "No space left on device")
        return self.file.write(data)

    def __exit__(self, *error):
        self.file.close()
        if self.call == "close":
            raise OSError(28, "No space left on device")


def failing_opens(monkeypatch, call: str, event: int):
    "The event-th file that a checkpoint opens for writing breaks; how many were opened."
    count = [0]

    def opener(path, mode="r", *args, **kwargs):
        file = open(path, mode, *args, **kwargs)
        if "x" not in mode and "w" not in mode:
            return file
        count[0] += 1
        return Broken(file, call) if count[0] == event else file

    monkeypatch.setattr(ck, "open", opener, raising=False)
    return count


def failing_calls(monkeypatch, call: str, event: int):
    "The event-th os.CALL fails; how many were made."
    count, real = [0], getattr(os, call)

    def wrapped(*args, **kwargs):
        count[0] += 1
        if count[0] == event:
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(os, call, wrapped)
    return count


FAILURES = dict(write=failing_opens, close=failing_opens, fsync=failing_calls, rename=failing_calls)


def check_failure(tmp_path, whole, call: str, event: int) -> bool:
    "Resume at step 8 with a disk that fails once; whether there were so many events."
    result, sound, c = whole
    out = tmp_path / f"{call}{event}"
    shutil.copytree(sound, out)
    shutil.rmtree(out / "step_00000012")
    shutil.rmtree(out / "model")
    good = digests(out / "step_00000008")
    with pytest.MonkeyPatch.context() as patch:
        count = FAILURES[call](patch, call, event)
        try:
            run(c, out_dir=out, resume=True)
            message = None
        except CheckpointError as error:
            message = str(error)
    if message is None:  # a failure while old files are deleted is none
        assert count[0] < event or (out / "model" / "training.json").is_file()
        return count[0] >= event
    assert str(out) in message and "No space left" in message and "\n" not in message, message
    assert call not in ("write", "close") or "bytes)" in message, message
    assert digests(out / "step_00000008") == good and not list(out.glob("*.tmp-*"))
    assert find_checkpoint(out).step in (8, 12)
    assert same(run(c, out_dir=out, resume=True), result)
    return True


@pytest.mark.parametrize("call", FAILURES)
def test_a_failing_disk_costs_nothing(tmp_path, whole, call, capfd):
    for event in (1, 6):
        check_failure(tmp_path, whole, call, event)


@pytest.mark.slow
@pytest.mark.parametrize("call", FAILURES)
def test_every_failing_write_fsync_close_and_rename(tmp_path, whole, call, capfd):
    event = 1
    while check_failure(tmp_path, whole, call, event):
        event += 1
    assert event > {"write": 6, "close": 6, "fsync": 12, "rename": 2}[call]
    print(f"{event - 1} failures of {call}")


FULL_DISK = """
import hashlib, json, os, shutil, subprocess, sys
from pathlib import Path
from cmmd import cli
from cmmd.checkpoint import find_checkpoint, list_checkpoints

def mount(*options):
    subprocess.run(["mount", *options, sys.argv[1]], check=True)

def sums(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}

def say(**about):
    print(json.dumps(about), flush=True)

mount("-t", "tmpfs", "-o", "size=300m", "tmpfs")
out, arguments = Path(sys.argv[1]) / "run", json.loads(sys.argv[2])
code = cli.run(arguments)
first, size = sums(out / "step_00000001"), sum(
    p.stat().st_size for p in (out / "step_00000001").iterdir())
weights = sums(out / "model")["diffusion_pytorch_model.safetensors"]
say(code=code, size=size)
for share in json.loads(sys.argv[3]):
    shutil.rmtree(out)
    mount("-o", f"remount,size={int(size * share)}")
    sys.stderr.write("-----\\n")
    code = cli.run(arguments)
    mount("-o", "remount,size=300m")
    saved = find_checkpoint(out)
    good = bool(saved) and saved.step == 1 and sums(out / "step_00000001") == first
    say(code=code, share=share, step=saved and saved.step, equal=good,
        litter=[p.name for p in out.glob("*.tmp-*")])
sys.stderr.write("-----\\n")
code = cli.run([*arguments, "--resume"])
say(code=code, whole=sums(out / "model")["diffusion_pytorch_model.safetensors"] == weights)
shutil.rmtree(out / "step_00000002")
mount("-o", "remount,ro")
sys.stderr.write("-----\\n")
code = cli.run([*arguments, "--resume"])
say(code=code, equal=sums(out / "step_00000001") == first)
"""


def check_full_disk(tmp_path, shares) -> None:
    "The real command in a file system of its own that is too small, then read-only."
    probe = ["unshare", "-m", "sh", "-c", f"mount -t tmpfs tmpfs {tmp_path}"]
    if not shutil.which("unshare") or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    disk = tmp_path / "disk"
    disk.mkdir()
    arguments = json.dumps(train_command(disk / "run", "--steps", 2))
    python = [sys.executable, "-c", FULL_DISK, disk, arguments, json.dumps(shares)]
    done = subprocess.run(
        ["unshare", "-m", *python], capture_output=True, text=True, timeout=600, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    first, *full, again, read_only = told
    assert first["code"] == 0 and len(full) == len(shares)
    errors = [part.rpartition("\r")[2] for part in done.stderr.split("-----\n")[1:]]
    for about, text in zip(full, errors):
        assert about["code"] == 1 and about["litter"] == [], about
        assert about["share"] < 1 or about["equal"], about  # the first save had room
        line = text.strip().splitlines()[-1]
        assert "No space left" in line and "bytes)" in line and str(disk) in line, text
        assert "Traceback" not in text, text
    assert again == {"code": 0, "whole": True}
    assert read_only == {"code": 1, "equal": True} and "Read-only" in errors[-1]


def test_a_full_disk_under_the_command(tmp_path):
    check_full_disk(tmp_path, [1.3])


@pytest.mark.slow
@pytest.mark.parametrize("shares", ([0.001, 0.3, 1.01, 1.1, 1.2], [1.4, 1.6, 1.8, 1.9, 1.98]))
def test_ten_full_disks_under_the_command(tmp_path, shares):
    check_full_disk(tmp_path, shares)


# ---------------------------------------------------------------- row 6: same seed, same sample
@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A network of the real kind after two steps: the result and the run's folder."
    data = toy_dataset(4, load_vae("tiny"), seed=3)
    sizes = UNetConfig.tiny(vae="tiny", mel_mean=data.mel_mean, mel_std=data.mel_std)
    c = config(steps=2, batch_size=2, warmup_steps=1)
    folder = tmp_path_factory.mktemp("trained") / "run"
    return train(new_model(sizes), data, config=c, out_dir=folder, device="cpu"), folder


def sample(model, *seeds, frames=4):
    made = generate(
        model,
        shape=(len(seeds), frames),
        num_sample_steps=3,
        generator=[make_generator("row 6", seed) for seed in seeds],
    )
    return made.video, made.audio


def test_save_load_sample_differs_by_nothing(trained):
    result, folder = trained
    here, again = sample(result.ema_model, 1, 2), sample(result.ema_model, 1, 2)
    there = sample(load_model(folder), 1, 2)
    newest = sample(load_start(list_checkpoints(folder)[0]).eval(), 1, 2)
    for made in (again, there, newest):
        assert all(torch.equal(x, y) for x, y in zip(here, made))
    for place, seed in enumerate((1, 2)):
        alone = sample(load_model(folder), seed)
        for one, both in zip(alone, here):
            torch.testing.assert_close(one[0], both[place], atol=1e-5, rtol=0)


@pytest.mark.slow
def test_two_processes_write_the_same_file(trained, tmp_path):
    _, folder = trained
    written = []
    for name in ("a", "b"):
        out = tmp_path / f"{name}.mp4"
        options = f"--seconds 0.6 --steps 3 --seed 7 --threads 1 --device cpu --model {folder}"
        process = command("sample", "--out", out, *options.split(), cwd=tmp_path)
        _, err = process.communicate(timeout=180)
        assert process.returncode == 0, err
        written.append(out.read_bytes())
    assert written[0] == written[1]


# ---------------------------------------------------------------- row 7: NaN never spreads
class SickClips:
    "The clips, of which every one is sick once `value` is set."

    def __init__(self, place: str):
        self.place, self.value = place, None
        self.ids, self.fingerprint = DATA.ids, "sick"

    def __len__(self):
        return len(DATA)

    def batch(self, indices):
        video, audio = (x.clone() for x in DATA.batch(indices))
        if self.value is not None:
            (audio if self.place == "sound" else video).view(len(indices), -1)[0, 3] = self.value
        return video, audio


def plant(place: str, value: float):
    "A trainer, and a function after which every step is spoilt at this place."
    model, switch = make_model(), []

    def loss(model, batch):
        good = joint_loss_fn(model, batch)
        if not switch or place not in ("loss", "part"):
            return good
        if place == "loss":
            return replace(good, total=good.total * value)
        return replace(good, video=good.video * value)

    if place.startswith("gradient"):
        number = int(place.removeprefix("gradient"))

        def spoil(grad):
            if not switch:
                return grad
            spoilt = grad.clone()
            spoilt.view(-1)[-1] = value
            return spoilt

        list(model.parameters())[number].register_hook(spoil)
    clips = SickClips(place)
    data = clips if place in ("sound", "latent") else DATA
    c = config(batch_size=2)
    trainer = Trainer(model, data, config=c, loss_fn=loss, device="cpu")

    def begin():
        switch.append(1)
        clips.value = value

    return trainer, begin


PLACES = ("sound", "latent", "loss", "part", *(f"gradient{i}" for i in range(6)))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", PLACES)
def test_a_planted_value_changes_nothing_and_three_in_a_row_are_named(place, value):
    trainer, begin = plant(place, value)
    for step in range(3):
        assert tr.train_step(trainer, trainer.data[step])
    before = state_of(trainer)
    begin()
    for step in (3, 4):
        assert not tr.train_step(trainer, trainer.data[step])
        assert torch.equal(state_of(trainer), before) and before.isfinite().all()
    assert (trainer.skipped, trainer.bad_in_row) == (2, 2)
    batches = trainer.data[5]
    with pytest.raises(TrainError) as error:
        tr.train_step(trainer, batches)
    text = str(error.value)
    assert "step 5" in text and "\n" not in text and torch.equal(state_of(trainer), before)
    assert all(name in text for batch in batches for name in batch.ids)


def all_finite(folder: Path) -> int:
    "How many tensors the checkpoints and the model below a folder hold; each is finite."
    tensors = [
        x
        for path in folder.rglob("*.safetensors")
        for x in ck.unpack_tensors(path, path.read_bytes()).values()
    ]
    assert all(x.isfinite().all() for x in tensors if x.is_floating_point())
    return len(tensors)


@pytest.mark.parametrize("where", ("loss", "weight", "moment", "average"))
def test_no_checkpoint_holds_a_value_that_is_not_finite(tmp_path, where, capfd):
    "A step that cannot be seen to be bad: the value sits in the state itself."
    trainer = Trainer(
        make_model(),
        DATA,
        config=config(save_every=1, steps=9),
        loss_fn=bad_loss({5, 6, 7} if where == "loss" else ()),
        device="cpu",
    )

    def plant_state(metrics_or_step):
        if where == "weight":
            trainer.params[1].data[0] = math.nan
        if where == "moment":
            next(iter(trainer.optimizer.state.values()))["exp_avg"].view(-1)[0] = math.nan
        if where == "average":
            trainer.ema.shadow_params[0].view(-1)[0] = math.inf

    with pytest.MonkeyPatch.context() as patch:
        real = tr.train_step

        def step(trainer, batches):
            if trainer.step == 5:
                plant_state(trainer)
            return real(trainer, batches)

        patch.setattr(tr, "train_step", step)
        with pytest.raises(TrainError) as error:
            tr.run_training(trainer, out_dir=tmp_path)
    text = str(error.value)
    assert "\n" not in text and "step" in text, text
    assert all_finite(tmp_path) > 0
    assert find_checkpoint(tmp_path, on_warning=print).step in (5, 7)  # 7: two skipped steps


# ---------------------------------------------------------------- row 8: out of memory
def limited(work, tmp_path, more: int) -> str:
    "What `work` says in a process that may take `more` bytes than this one has."

    def child():
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + more
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        try:
            text = work()
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        (tmp_path / "said").write_text(text)

    os.waitpid(fork(child), 0)
    return (tmp_path / "said").read_text()


def test_memory_that_is_really_full_is_a_sentence(tmp_path, trained):
    "The same process goes on with a smaller batch, from the checkpoint that is there."
    data = toy_dataset(4, load_vae("tiny"), seed=3)
    sizes = trained[0].model.config

    def work():
        c = config(steps=3, batch_size=1, warmup_steps=1, save_every=1)
        out = tmp_path / "run"
        train(new_model(sizes), data, config=c, out_dir=out, device="cpu")
        before = digests(out / "step_00000003")
        try:
            train(new_model(sizes), data, config=replace(c, batch_size=512), device="cpu")
            return "no error"
        except TrainError as error:
            text = str(error)
        again = train(new_model(sizes), data, config=c, out_dir=out, device="cpu", resume=True)
        fresh = train(new_model(sizes), data, config=replace(c, steps=1), device="cpu")
        return json.dumps([text, again.step, fresh.step, digests(out / "step_00000003") == before])

    said = limited(work, tmp_path, 1 << 30)
    assert said.startswith("["), said
    text, *after = json.loads(said)
    assert after == [3, 1, True] and "\n" not in text
    assert re.search(r"out of memory at step 0 with batch_size 512 .*allocate \d+ bytes", text)
    knobs = ("batch_size", "gradient_accumulation", "smaller model", "gradient_checkpointing")
    assert sum(knob in text.partition(";")[2] for knob in knobs) >= 3


@pytest.mark.parametrize("given", ("video", "audio", "both"))
def test_generation_without_memory_is_a_sentence(given, tmp_path, monkeypatch, capsys):
    pipe = CMMDPipeline.from_pretrained("toy-bounce")
    clips = make_clips(1, spec=pipe.model.config.clip, seed=5)
    kind = type(pipe.model)
    real, full = kind.forward, [True]

    def forward(self, *args, **kwargs):
        if full[0]:
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 7.00 GiB. GPU 0 "
                "has a total capacity of 4 GiB\nand more lines"
            )
        return real(self, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", forward)
    ask = {
        "video": dict(video=clips.video),
        "audio": dict(audio=clips.waveform),
        "both": dict(shape=(1, 18)),
    }[given]
    for _ in range(2):
        with pytest.raises(Exception) as error:
            pipe(**ask, num_inference_steps=2)
        text = str(error.value)
        assert "\n" not in text and "out of memory" in text and "7.00 GiB" in text, text
        knobs = ("short", "fewer", "window", "guidance_weight", "bfloat16", "smaller model")
        assert sum(knob in text for knob in knobs) >= 3, text
    if given == "both":
        out = tmp_path / "x.mp4"
        arguments = ["sample", "--out", str(out), "--seconds", "0.4", "--steps", "1"]
        capsys.readouterr()  # the bars of the pipeline's own calls
        assert cli.run(arguments) == 1 and not out.exists()
        err = capsys.readouterr().err
        assert "out of memory" in err and len(err.strip().splitlines()) <= 3, err
    full[0] = False
    small = {name: x[:, :4] if name == "video" else x for name, x in ask.items()}
    assert pipe(**small, num_inference_steps=1).audio.isfinite().all()


# ---------------------------------------------------------------- row 17: two runs, one folder
def check_race(tmp_path, race: int, whole):
    "Two trainers start at the same moment in one folder."
    out, notes = tmp_path / f"race{race}", tmp_path / f"notes{race}"
    notes.mkdir()
    result, _, c = whole
    gate, key = os.pipe()

    def loss(model, batch):
        end = time.monotonic() + 30  # the winner works until the other one has lost
        while batch.step == 6 and not list(notes.glob("lost*")) and time.monotonic() < end:
            time.sleep(0.01)
        return joint_loss_fn(model, batch)

    loss.__name__ = "joint_loss_fn"

    def work():
        os.read(gate, 1)
        began = time.monotonic()
        try:
            run(c, out_dir=out, loss_fn=loss)
            (notes / f"won{os.getpid()}").touch()
        except CheckpointError as error:
            text = f"{time.monotonic() - began} {error}"
            (notes / "losing").write_text(text)
            os.rename(notes / "losing", notes / f"lost{os.getpid()}")

    pids = [fork(work) for _ in range(2)]
    os.write(key, b"xx")
    for pid in pids:
        os.waitpid(pid, 0)
    (won,), (lost,) = notes.glob("won*"), notes.glob("lost*")
    seconds, _, text = lost.read_text().partition(" ")
    assert float(seconds) < 5 and f"process {won.name[3:]} " in text and "\n" not in text
    assert same(run(c, out_dir=out, resume=True), result)


def test_a_race_has_one_winner(tmp_path, whole):
    for race in range(3):
        check_race(tmp_path, race, whole)


@pytest.mark.slow
def test_20_races_have_one_winner_each(tmp_path, whole):
    for race in range(20):
        check_race(tmp_path, race, whole)


def test_the_lock_holds_on_a_full_disk(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with ck.RunLock(tmp_path), pytest.raises(CheckpointError, match="by another process"):
            ck.RunLock(tmp_path).__enter__()
    with ck.RunLock(tmp_path):
        pass


def test_resuming_something_else_shows_the_difference(tmp_path, trained, capsys):
    _, folder = trained
    before = digests(folder)
    assert cli.run(train_command(folder, "--steps", 3, "--seed", 5, "--resume")) == 1
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert "is of another run" in err and "train.seed: 0 there, 5 here" in err, err
    assert cli.run(train_command(folder, "--steps", 3)) == 1, "an earlier run is not written over"
    assert digests(folder).items() >= before.items()


# ---------------------------------------------------------------- row 11: no file can run code
class Planted:
    "An object whose unpickling would make a folder."

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


WATCHED = {"pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "os.mkdir"}
watching: list = []


def _hook(name, args):
    if watching and name in WATCHED and (name != "os.mkdir" or str(watching[0]) in str(args[0])):
        watching.append((name, args))


sys.addaudithook(_hook)


@pytest.fixture
def trap(tmp_path, monkeypatch):
    "Where a planted program would leave a mark; what was unpickled, loaded or started."
    mark, modules = tmp_path / "ran", set(sys.modules)

    def never(*args, **kwargs):
        raise AssertionError("torch.load was called")

    monkeypatch.setattr(torch, "load", never)
    (tmp_path / "planted").mkdir()
    for name in ("planted", "modeling_planted", "pipeline"):
        (tmp_path / "planted" / f"{name}.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    monkeypatch.syspath_prepend(tmp_path / "planted")
    watching[:] = [mark]
    try:
        yield mark
        events = watching[1:]
    finally:
        watching.clear()
    assert not mark.exists() and events == []
    assert not any("planted" in name for name in set(sys.modules) - modules)


def pickled(mark: Path, form: int) -> bytes:
    "A program in the forms that torch and pickle know."
    if form == 0:
        return pickle.dumps(Planted(mark), protocol=2)
    file = io.BytesIO()
    torch.save({"w": Planted(mark)}, file, _use_new_zipfile_serialization=form == 1)
    return file.getvalue()


@pytest.fixture(scope="module")
def bases(tmp_path_factory, whole, trained, request):
    "Good folders of every kind that we open."
    top = tmp_path_factory.mktemp("bases")
    shutil.copytree(whole[1], top / "run")
    shutil.copytree(trained[1], top / "command")
    CMMDPipeline.from_pretrained("toy-bounce").save_pretrained(top / "pipe")
    shutil.copytree(request.getfixturevalue("clap_folder"), top / "clap")
    (top / "files").mkdir()
    save_dataset(toy_dataset(2, load_vae("tiny")), top / "files" / "clips.safetensors")
    film = make_clips(1, spec=ClipSpec.toy().with_frames(30), seed=11)
    (top / "films").mkdir()
    write_clip(top / "films" / "a.mp4", film.video[0], film.waveform[0], spec=ClipSpec.toy())
    plan = PrepareConfig(clip=ClipSpec.toy(), vae="tiny", stride=5)
    sources = folder_sources(top / "films", test_share=0.0)
    prepare(sources, top / "data", config=plan, vae=load_vae("tiny"))
    (top / "sounds").mkdir()
    wave = torch.randn(9_000, generator=make_generator("row 11")) / 10
    write_wav(top / "sounds" / "good.wav", wave, spec=ClipSpec.toy())
    load_sounds(top / "sounds", top / "sounds" / "cache", least=2048)
    return top


def resume(folder):
    run(config(save_every=4, steps=12), out_dir=folder, resume=True)


def sounds(folder):
    load_sounds(folder, folder / "cache", least=2048)


def lists(folder):
    (folder / "x.csv").rename(folder / "EPIC_Sounds_train.csv")
    epic_sources(folder, folder / "EPIC_Sounds_train.csv", clip=ClipSpec.toy())


def aist(folder):
    aist_sources(folder, folder)


def first_clip(folder):
    dataset = open_dataset(folder)
    for i in range(len(dataset)):
        dataset.batch([i])


def sealed_member(folder, data: bytes):
    "A shard whose index vouches for a program."
    index = get_json(folder / "index.json")
    path = folder / index["shards"][0]["file"]
    row = index["clips"][0]
    row |= {"offset": 512, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    content = bytearray(path.read_bytes())
    content[512 : 512 + len(data)] = data
    path.write_bytes(content)
    put_json(folder / "index.json", index)


def index_to(name: str):
    "Weights in several pieces, one of them a pickle."

    def plant(folder, data):
        for path in folder.glob("*.safetensors"):
            path.unlink()
        (folder / "piece.bin").write_bytes(data)
        about = {"metadata": {}, "weight_map": {"encoder.conv_in.weight": "piece.bin"}}
        (folder / f"{name}.safetensors.index.json").write_text(json.dumps(about))

    return plant


def only(name: str):
    "A pickle where diffusers and transformers used to look for weights."

    def plant(folder, data):
        for path in folder.glob("*.safetensors"):
            path.unlink()
        (folder / name).write_bytes(data)

    return plant


def json_with(name: str, **more):
    "A configuration that asks for code."

    def plant(folder, data):
        path = folder / name
        about = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps({**about, **more}))

    return plant


REMOTE = {"auto_map": {"AutoModel": "modeling_planted.P", "AutoFeatureExtractor": "planted.P"}}
WEIGHTS = "diffusion_pytorch_model.safetensors"
STEP = "step_00000012"
# base, what is planted (a file's name or a function), who opens it
FILES = {
    **{
        f"checkpoint {name}": ("run", f"{STEP}/{name}", resume)
        for name in (
            "model.safetensors",
            "ema.safetensors",
            "optimizer.safetensors",
            "state.json",
            "config.json",
            "manifest.json",
        )
    },
    "metrics": ("run", "metrics.jsonl", resume),
    "half-written metrics": ("run", "metrics.jsonl.new", resume),
    "lock": ("run", "run.lock", resume),
    "tensorboard": ("run", "tensorboard/events.out.tfevents.1.x", resume),
    "finished model's record": ("run", "model/training.json", resume),
    "record in info": ("command", "model/training.json", lambda f: info(f)),
    "run's config.json": ("command", "model/config.json", load_model),
    "run's weights": ("command", f"model/{WEIGHTS}", load_model),
    "start from a checkpoint": (
        "command",
        "step_00000002/ema.safetensors",
        lambda f: load_start(f / "step_00000002"),
    ),
    "pipeline's index": ("pipe", "model_index.json", CMMDPipeline.from_pretrained),
    "pipeline's card": ("pipe", "README.md", CMMDPipeline.from_pretrained),
    "pipeline of planted class": (
        "pipe",
        json_with("model_index.json", model=["planted", "P"]),
        CMMDPipeline.from_pretrained,
    ),
    "pipeline with a module": (
        "pipe",
        json_with("model_index.json", _module="pipeline", _class_name=["pipeline", "P"]),
        CMMDPipeline.from_pretrained,
    ),
    **{
        f"pipeline's {part} {name}": ("pipe", f"{part}/{name}", CMMDPipeline.from_pretrained)
        for part in ("model", "vae", "vocoder")
        for name in ("config.json", WEIGHTS)
    },
    "model that is a .bin": ("pipe/model", only("diffusion_pytorch_model.bin"), load_model),
    "vae's config.json": ("pipe/vae", "config.json", load_vae),
    "vae's weights": ("pipe/vae", WEIGHTS, load_vae),
    "vae that is a .bin": ("pipe/vae", only("diffusion_pytorch_model.bin"), load_vae),
    "vae in pieces": ("pipe/vae", index_to("diffusion_pytorch_model"), load_vae),
    "vae that asks for code": ("pipe/vae", json_with("config.json", **REMOTE), load_vae),
    "vae that asks for a quantizer": (
        "pipe/vae",
        json_with("config.json", quantization_config={"quant_method": "planted"}),
        load_vae,
    ),
    "vocoder's config.json": ("pipe/vocoder", "config.json", load_vocoder),
    "vocoder's weights": ("pipe/vocoder", WEIGHTS, load_vocoder),
    **{
        f"CLAP's {name}": ("clap", name, load_clap)
        for name in ("config.json", "preprocessor_config.json", "model.safetensors")
    },
    "CLAP that is a .bin": ("clap", only("pytorch_model.bin"), load_clap),
    "CLAP in pieces": ("clap", index_to("model"), load_clap),
    "CLAP that asks for code": ("clap", json_with("config.json", **REMOTE), load_clap),
    "CLAP's ear that asks for code": (
        "clap",
        json_with("preprocessor_config.json", **REMOTE),
        load_clap,
    ),
    "I3D": ("files", "i3d.safetensors", lambda f: load_i3d(f / "i3d.safetensors")),
    "I3D as it is published": ("files", "i3d.pt", lambda f: load_i3d(f / "i3d.pt")),
    "clips": ("files", "clips.safetensors", lambda f: load_dataset(f / "clips.safetensors")),
    "data's index": ("data", "index.json", first_clip),
    "data's shard": ("data", "shard-000000.tar", first_clip),
    "data's clip, sealed": ("data", sealed_member, first_clip),
    "data's plan": ("data", "plan.json", lambda f: again(f)),
    "data's shard index": ("data", "shard-000000.json", lambda f: again(f)),
    "data's report": ("data", "report.json", lambda f: again(f)),
    "a sound": ("sounds", "evil.wav", sounds),
    "an archive of sounds": ("sounds", "evil.tar", sounds),
    "a clip's label in an archive": ("sounds", lambda f, data: packed(f, data), sounds),
    "sounds' index": ("sounds", "cache/sounds.json", sounds),
    "sounds' samples": ("sounds", "cache/sounds.f32", sounds),
    "a film": ("films", "evil.mp4", lambda f: read_media(f / "evil.mp4", spec=ClipSpec.toy())),
    "EPIC-Sounds' list": ("films", "x.csv", lists),
    "AIST++'s list": ("films", "crossmodal_test.txt", aist),
    "raters' answers": ("films", "answers.csv", read_answers),
    "a saved study": ("films", "study.json", lambda f: load_study(f / "study.json")),
    "a study's key": ("films", "key.json", lambda f: read_key(f / "key.json")),
    "a recipe": ("films", "recipe.toml", lambda f: load_recipe(f / "recipe.toml")),
}


def info(folder):
    assert cli.run(["info", "--model", str(folder)]) == 1


def again(folder):
    "Prepare once more what lies there."
    plan = PrepareConfig(clip=ClipSpec.toy(), vae="tiny", stride=5)
    films = folder_sources(folder.parent / "films", test_share=0.0)
    prepare(films, folder, config=plan, vae=load_vae("tiny"))


def packed(folder, data):
    "A shard as webdataset writes it: it would unpickle the label."
    with tarfile.open(folder / "evil.tar", "w") as tar:
        for name in ("0.wav", "0.pyd", "0.pth", "0.pickle", "0.cls", "0.json", "__init__.py"):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize("name", FILES)
def test_no_file_runs_code(name, bases, tmp_path, trap, capfd):
    base, what, opens = FILES[name]
    top = tmp_path / "here"
    for part in {base.partition("/")[0], "films"}:
        shutil.copytree(bases / part, top / part)
    form = list(FILES).index(name) % 3
    data = pickled(trap, form)
    if callable(what):
        what(top / base, data)
    else:
        (top / base / what).write_bytes(data)
    watching[1:] = []  # what the planting itself did
    try:
        opens(top / base)
    except (ValueError, RuntimeError, OSError) as error:
        assert str(error).count("\n") <= 2, str(error)


def test_there_are_enough_malicious_files():
    assert len(FILES) >= 25


def test_the_trap_works(tmp_path):
    "What is watched for is really seen."
    mark = tmp_path / "ran"
    watching[:] = [mark]
    try:
        pickle.loads(pickled(mark, 0))
    finally:
        seen = watching[1:]
        watching.clear()
    assert mark.is_dir() and {name for name, _ in seen} == {"pickle.find_class", "os.mkdir"}


FORBIDDEN = re.compile(
    r"\b(?:c|_)?pickle\b|\bdill\b|\bjoblib\b|\bmarshal\b|\bshelve\b|torch\.load|torch\.save"
    r"|torch\.hub|torch\.jit\.load|allow_pickle|yaml\.|(?<![\w.])eval\(|(?<![\w.])exec\("
    r"|__import__|import_module|runpy|os\.system|os\.popen|shell\s*=|trust_remote_code"
    r"|weights_only|extractall|unpack_archive|\.extract\(|(?<![\w.])compile\("
)


def code_of(text: str) -> str:
    "The source without its strings and comments."
    kept = [
        token.string if token.type not in (tokenize.STRING, tokenize.COMMENT) else "''"
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
    ]
    return " ".join(kept).replace(" . ", ".").replace(" (", "(").replace(" = ", "=")


def exported_cells() -> dict[str, str]:
    cells = {}
    for path in sorted((ROOT / "nbs").glob("*.ipynb")):
        for i, cell in enumerate(json.loads(path.read_text())["cells"]):
            text = "".join(cell["source"])
            if cell["cell_type"] == "code" and re.match(r"\s*#\|\s*export\b", text):
                cells[f"{path.name}, cell {i}"] = text
    return cells


def test_no_exported_cell_can_run_a_file():
    "test_style.py reads the modules' syntax trees; this is the text of the cells they come from."
    cells = exported_cells()
    assert len(cells) > 300
    found = {name: FORBIDDEN.findall(code_of(text)) for name, text in cells.items()}
    assert {name: words for name, words in found.items() if words} == {}
    for planted in ("pickle.loads(y)", "torch.load(p)", "np.load(p, allow_pickle=True)", "eval(x)"):
        assert FORBIDDEN.search(code_of(planted)), planted
    for harmless in ("model.eval()", "re.compile(x)", "'eval(x)'  # pickle", "Module.compile(m)"):
        assert not FORBIDDEN.search(code_of(harmless)), harmless


# ---------------------------------------------------------------- row 12: nothing outside
NAMES = (
    "../up.json",
    "../../up.safetensors",
    "/tmp/absolute.json",
    "a/b.json",
    "..",
    "./x.json",
    "x\\..\\y.json",
    "~/.bashrc",
    "$HOME.json",
    "x.json\0",
    "x.json\n",
    "-rf.json",
    "a" * 300 + ".json",
    "manifest.json",
    "X.JSON",
    "run.lock",
)
MEMBERS = (
    "../up.wav",
    "../../../../up.wav",
    "/tmp/absolute.wav",
    "a/../../up.wav",
    "link.wav",
    "dir/through.wav",
    "hard.wav",
    "null.wav",
    "pipe.wav",
    "folder.wav",
    "~.wav",
    "x.wav\n../y.wav",
    "a" * 300 + ".wav",
    "sounds.f32",
    "cache/sounds.json",
    "x.py",
)
KINDS = {
    "link.wav": tarfile.SYMTYPE,
    "hard.wav": tarfile.LNKTYPE,
    "null.wav": tarfile.CHRTYPE,
    "pipe.wav": tarfile.FIFOTYPE,
    "folder.wav": tarfile.DIRTYPE,
}
LINKS = (
    "metrics.jsonl",
    "metrics.jsonl.new",
    "run.lock",
    "tensorboard",
    "model",
    "step_00000016",
    "step_00000012.tmp-1-0",
    "step_00000012.old-1-0",
)


def outside(top: Path, inside: Path) -> dict:
    "Every file and folder around, with its content and times."
    found = {}
    for path in sorted(top.rglob("*")):
        if path == inside or inside in path.parents:
            continue
        about = path.lstat()
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        found[str(path)] = (about.st_mode, about.st_size, about.st_mtime_ns, content)
    return found


def hostile_manifest(folder, name):
    files = {"state.json": b"{}\n", "config.json": b"{}\n", name: b"{}\n"}
    folder.mkdir()
    for inner in ("state.json", "config.json"):
        (folder / inner).write_bytes(b"{}\n")
    (folder / "manifest.json").write_bytes(ck.make_manifest(files, step=9, config={}))


def hostile_archive(folder, name):
    folder.mkdir()
    with tarfile.open(folder / "evil.tar", "w") as tar:
        if name == "dir/through.wav":
            member = tarfile.TarInfo("dir")
            member.type, member.linkname = tarfile.SYMTYPE, str(folder.parent)
            tar.addfile(member)
        member = tarfile.TarInfo(name)
        member.type = KINDS.get(name, tarfile.REGTYPE)
        if name in ("link.wav", "hard.wav"):
            member.linkname = str(folder.parent / "precious")
        member.size = 5_000 if member.isreg() else 0
        tar.addfile(member, io.BytesIO(bytes(5_000)))


@pytest.mark.parametrize("name", NAMES)
def test_a_hostile_manifest_writes_nothing_outside(name, tmp_path):
    (tmp_path / "precious").write_text("precious")
    inside = tmp_path / "run"
    inside.mkdir()
    hostile_manifest(inside / "step_00000009", name)
    before = outside(tmp_path, inside)
    with pytest.raises(CheckpointError):
        ck.load_checkpoint(inside / "step_00000009")
    with pytest.raises(CheckpointError, match="none of the 1"):
        run(config(), out_dir=inside, resume=True)
    ck.prune_checkpoints(inside)
    assert outside(tmp_path, inside) == before and not Path("/tmp/absolute.json").exists()


@pytest.mark.parametrize("name", MEMBERS)
def test_a_hostile_archive_writes_nothing_outside(name, tmp_path, monkeypatch):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    hostile_archive(tmp_path / "in", name)
    inside = tmp_path / "cache"
    before = outside(tmp_path, inside)
    before.pop(str(tmp_path / "scratch"))  # its time changes
    with pytest.raises(ValueError):
        load_sounds(tmp_path / "in", inside, least=2048)
    after = outside(tmp_path, inside)
    after.pop(str(tmp_path / "scratch"))
    assert after == before and not Path("/tmp/absolute.wav").exists()
    assert {p.name for p in inside.iterdir()} <= {
        "sounds.lock",
        "sounds.json",
        "sounds.f32",
        "report.json",
    }


@pytest.mark.parametrize("name", LINKS)
def test_a_run_with_planted_links_writes_nothing_outside(name, tmp_path, whole):
    "Somebody else's run folder, gone on with here."
    _, sound, c = whole
    inside, away = tmp_path / "run", tmp_path / "away"
    shutil.copytree(sound, inside)
    shutil.copytree(sound / "step_00000012", away / "folder")
    (away / "file").write_text('{"step": 1}\n')
    for part in (inside / "step_00000012", inside / "model"):
        shutil.rmtree(part)
    path = inside / name
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(away / ("file" if "." in name and "step" not in name else "folder"))
    before = outside(tmp_path, inside)
    try:
        run(c, out_dir=inside, resume=True)
    except (CheckpointError, ValueError, OSError) as error:
        assert "\n" not in str(error)
    assert outside(tmp_path, inside) == before


def test_there_are_40_hostile_archives_and_manifests():
    assert len(NAMES) + len(MEMBERS) + len(LINKS) >= 40
