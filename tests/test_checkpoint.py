"Faults that a checkpoint must survive: damage, hostile files, full disks, kills, two runs at once."

import json
import os
import random
import resource
import shutil
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from cmmd import checkpoint as ck
from cmmd.checkpoint import CheckpointError, RunLock, find_checkpoint, load_checkpoint
from cmmd.checkpoint import save_checkpoint

FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "config.json", "manifest.json")


def content(step):
    g = torch.Generator().manual_seed(step)
    tensors = {
        "model": {"w": torch.randn(40, 30, generator=g), "b": torch.randn(30, generator=g)},
        "optimizer": {
            "0.exp_avg": torch.randn(40, 30, generator=g),
            "0.step": torch.tensor(float(step)),
        },
    }
    state = {"loss": 1 / (step + 3), "step": step}
    return {"tensors": tensors, "state": state, "config": {"seed": 0}}


def save(run, step, **changes):
    return save_checkpoint(run, step, **{**content(step), **changes})


def same(found, step):
    want = content(step)["tensors"]
    return (
        found.step == step
        and found.state == content(step)["state"]
        and all(torch.equal(found.tensors[g][n], t) for g in want for n, t in want[g].items())
    )


@pytest.fixture
def run(tmp_path):
    for step in (1, 2):
        save(tmp_path / "run", step)
    return tmp_path / "run"


def forge(folder, files, step=9, config=None):
    "A checkpoint with correct hashes and any content."
    folder.mkdir(parents=True)
    for name, data in files.items():
        try:
            (folder / name).write_bytes(data) if "/" not in name else None
        except (OSError, ValueError):
            pass
    (folder / "manifest.json").write_bytes(ck.make_manifest(files, step=step, config=config or {}))
    return folder


PLAIN = {"state.json": b"{}\n", "config.json": b"{}\n"}


# ---------------------------------------------------------------- damage
def spoil(folder, rng):
    "One random damage; returns what was done."
    kind = rng.choice(("flip", "cut", "empty", "delete", "grow", "swap", "nan"))
    name = rng.choice(FILES)
    path = folder / name
    data = bytearray(path.read_bytes())
    if kind == "flip":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    if kind == "cut":
        data = data[: rng.randrange(len(data))]
    if kind == "empty":
        data = b""
    if kind == "grow":
        data += bytes(rng.randrange(1, 9))
    if kind == "swap":
        name, path = "model.safetensors", folder / "model.safetensors"
        data = (folder / "optimizer.safetensors").read_bytes()
    if kind == "nan":
        name, path = "model.safetensors", folder / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-4:] = b"\0\0\xc0\x7f"
    path.unlink()
    if kind != "delete":
        path.write_bytes(data)
    return f"{kind} {name}"


def check_damages(run, n, seed):
    rng, expect = random.Random(seed), content(2)["tensors"]
    sound = run.parent / "sound"
    shutil.copytree(run / "step_00000002", sound)
    for i in range(n):
        shutil.rmtree(run / "step_00000002")
        shutil.copytree(sound, run / "step_00000002")
        what, lines = spoil(run / "step_00000002", rng), []
        with pytest.raises(CheckpointError):
            load_checkpoint(run / "step_00000002", expect=expect)
        assert same(find_checkpoint(run, expect=expect, on_warning=lines.append), 1), what
        assert len(lines) == 1 and "step_00000002" in lines[0] and "\n" not in lines[0], what


def test_damages_are_found(run):
    check_damages(run, 60, seed=0)


@pytest.mark.slow
def test_200_damages_are_found(run):
    check_damages(run, 200, seed=1)


def test_wrong_names_shapes_and_types(run):
    model = content(2)["tensors"]["model"]
    for wrong in (
        {"w": model["w"]},
        {**model, "x": model["b"]},
        {**model, "w": model["w"].T.clone()},
        {**model, "b": model["b"].double()},
    ):
        with pytest.raises(CheckpointError):
            load_checkpoint(run / "step_00000002", expect={"model": wrong})
    with pytest.raises(CheckpointError):
        load_checkpoint(run / "step_00000002", expect={"ema": model})


def test_swapped_folders(run):
    os.rename(run / "step_00000001", run / "x")
    os.rename(run / "step_00000002", run / "step_00000001")
    os.rename(run / "x", run / "step_00000002")
    with pytest.raises(CheckpointError):
        find_checkpoint(run, on_warning=print)


def test_nan_is_never_saved_nor_loaded(run, tmp_path):
    for value in (float("nan"), float("inf"), -float("inf")):
        bad = {"model": {"w": torch.tensor([1.0, value])}}
        with pytest.raises(ValueError):
            save(run, 3, tensors=bad)
        with pytest.raises(ValueError):
            save(run, 3, state={"loss": value})
    assert same(find_checkpoint(run), 2) and not list(run.glob("*.tmp-*"))
    bad = ck.tensors_to_bytes({"w": torch.tensor([float("nan")])})
    with pytest.raises(CheckpointError):
        load_checkpoint(forge(tmp_path / "f", {**PLAIN, "model.safetensors": bad}))
    nan = {"state.json": b'{"loss": NaN}\n', "config.json": b"{}\n"}
    with pytest.raises(CheckpointError):
        load_checkpoint(forge(tmp_path / "g", nan))


def test_never_from_nothing(run):
    for path in run.glob("step_*"):
        (path / "state.json").unlink()
    with pytest.raises(CheckpointError, match="none of the 2"):
        find_checkpoint(run, on_warning=print)
    assert find_checkpoint(run / "absent") is None


# ---------------------------------------------------------------- hostile files
@pytest.mark.parametrize(
    "name",
    [
        "../x.json",
        "/tmp/x.json",
        "a/b.json",
        "..",
        ".",
        "",
        "x.pt",
        "x.pkl",
        "manifest.json",
        "X.json",
        "x.json\n",
        "x\0.json",
        "con:.json",
        "\u0445.json",
        "a" * 300 + ".json",
    ],
)
def test_hostile_names(tmp_path, name):
    folder = forge(tmp_path / "f", {**PLAIN, name: b"{}\n"})
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError):
        load_checkpoint(folder)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_special_files(run, name, kind):
    path = run / "step_00000002" / name
    os.rename(path, run / "aside")
    if kind == "link":
        path.symlink_to(run / "aside")
    if kind == "pipe":
        os.mkfifo(path)
    if kind == "folder":
        path.mkdir()
    began = time.monotonic()
    with pytest.raises(CheckpointError):
        load_checkpoint(run / "step_00000002")
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b"[" * 100_000,
        b'{"a":' * 10_000,
        b"\xff\xfe",
        b"9" * 10_000,
        b" " * (2 << 20),
        b'{"sha256": 1}',
        b'{"files": {"a": NaN}}',
    ],
)
def test_hostile_manifests(run, data):
    (run / "step_00000002" / "manifest.json").write_bytes(data)
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(run / "step_00000002")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"format_version": 2},
        {"step": -1},
        {"step": "2"},
        {"step": True},
        {"files": []},
        {"files": {}},
        {"files": {"state.json": 1, "config.json": 2}},
        {"config_sha256": None},
        {"files": {"state.json": {"bytes": "3"}, "config.json": {"bytes": 3}}},
    ],
)
def test_sealed_but_wrong_manifests(tmp_path, change):
    folder = forge(tmp_path / "f", PLAIN)
    body = json.loads((folder / "manifest.json").read_bytes()) | change
    del body["sha256"]
    seal = ck.hashlib.sha256(ck.to_json(body)).hexdigest()
    (folder / "manifest.json").write_bytes(ck.to_json({**body, "sha256": seal}))
    with pytest.raises(CheckpointError):
        load_checkpoint(folder)


class Planted:
    "An object whose unpickling would leave a file behind."

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", FILES)
def test_no_file_runs_code(run, tmp_path, name):
    torch.save(Planted(tmp_path / "ran"), run / "step_00000002" / name)
    with pytest.raises(CheckpointError):
        load_checkpoint(run / "step_00000002")
    if name.endswith(".safetensors"):  # and with a manifest that vouches for it
        data = (run / "step_00000002" / name).read_bytes()
        with pytest.raises(CheckpointError):
            load_checkpoint(forge(tmp_path / "f", {**PLAIN, name: data}))
    assert not (tmp_path / "ran").exists()


def test_optimizer_state_is_checked():
    model = torch.nn.Linear(3, 2)
    adam = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    adam.step()
    tensors, state = ck.optimizer_tensors(adam)
    for key in ("7.exp_avg", "x.exp_avg", "-1.exp_avg", "exp_avg"):
        fresh = torch.optim.Adam(torch.nn.Linear(3, 2).parameters())
        with pytest.raises(CheckpointError):
            ck.load_optimizer(fresh, {**tensors, key: torch.zeros(2, 3)}, state=state)
        assert not fresh.state


# ---------------------------------------------------------------- failing disks
@contextmanager
def failing(monkeypatch, name, event, code=28):
    "The event-th call of os.NAME fails as on a full disk."
    count, real = [0], getattr(os, name)

    def call(*args, **kwargs):
        count[0] += 1
        if count[0] == event:
            raise OSError(code, os.strerror(code))
        return real(*args, **kwargs)

    with monkeypatch.context() as m:
        m.setattr(os, name, call)
        yield count


@pytest.mark.parametrize("name", ["fsync", "rename", "mkdir"])
@pytest.mark.parametrize("step", [2, 3])  # 2 replaces a checkpoint, 3 is new
def test_every_failing_call(run, monkeypatch, name, step):
    for event in range(1, 40):
        with failing(monkeypatch, name, event) as count:
            try:
                save(run, step)
            except CheckpointError as error:
                message = str(error)
            else:
                message = None
        found = find_checkpoint(run, on_warning=lambda line: None)
        assert same(found, found.step) and found.step >= 2
        assert not list(run.glob("*.tmp-*")) or message is None
        if count[0] < event:
            break
        if message:
            assert str(run) in message and "No space left" in message
        if message:
            assert "\n" not in message
    assert count[0] < event


def test_failing_writes(run, monkeypatch):
    class Full:
        def __init__(self, file, at):
            self.file, self.at = file, at

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def write(self, data):
            self.file.write(data[: self.at])
            raise OSError(28, "No space left on device")

    for name in FILES:

        def opener(path, mode="r", *args, **kwargs):
            file = open(path, mode, *args, **kwargs)
            return Full(file, 10) if "x" in mode and Path(path).name == name else file

        with monkeypatch.context() as m:
            m.setattr(ck, "open", opener, raising=False)
            with pytest.raises(CheckpointError, match=rf"{name} \([\d,]+ bytes\): No space"):
                save(run, 3)
        assert same(find_checkpoint(run), 2) and not list(run.glob("*.tmp-*"))


def test_ten_byte_offsets(run):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in range(0, 4800, 480):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(CheckpointError, match="bytes"):
                save(run, 3)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert same(find_checkpoint(run), 2)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(run):
    os.chmod(run, 0o500)
    try:
        with pytest.raises(CheckpointError, match="Permission denied"):
            save(run, 3)
    finally:
        os.chmod(run, 0o700)
    assert same(find_checkpoint(run), 2)


def test_older_ones_go_last(run, monkeypatch):
    for step in (3, 4):
        save(run, step)
    with failing(monkeypatch, "rename", 1), pytest.raises(CheckpointError):
        save(run, 5)
    assert [p.name for p in ck.list_checkpoints(run)] == [f"step_{s:08d}" for s in (4, 3, 2)]
    (run / "step_00000004" / "state.json").unlink()  # a damaged one does not count towards keep
    save(run, 5)
    assert {p.name for p in ck.list_checkpoints(run)} == {f"step_{s:08d}" for s in (5, 4, 3, 2)}
    with pytest.raises(ValueError):
        save(run, 6, keep=2)


# ---------------------------------------------------------------- kills
def fork(work):
    "Run work in a child; returns its process id."
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
    finally:
        os._exit(0)


def kill_at_event(run, step, event):
    "A save killed just before its event-th fsync or rename; whether it was."

    def work():
        count = [0]

        def deadly(act):
            def call(*args):
                count[0] += 1
                if count[0] == event:
                    os.kill(os.getpid(), signal.SIGKILL)
                return act(*args)

            return call

        os.fsync, os.rename = deadly(os.fsync), deadly(os.rename)
        save(run, step)

    return os.waitpid(fork(work), 0)[1] == signal.SIGKILL


@pytest.mark.parametrize("step", [2, 3])
def test_killed_at_every_event(run, step):
    found, event, killed = [], 0, True
    while killed:
        event += 1
        trial = run.parent / f"trial{event}"
        shutil.copytree(run, trial)
        killed = kill_at_event(trial, step, event)
        found.append(find_checkpoint(trial).step)
        assert same(find_checkpoint(trial), found[-1])
        save(trial, 4)
        assert not list(trial.glob("*.tmp-*"))
    assert set(found) == {2, step} and found == sorted(found) and event > 10


def check_random_kills(run, n, seed):
    rng = random.Random(seed)
    for _ in range(n):
        last = find_checkpoint(run).step

        def work():
            for step in range(last + 1, last + 10_000):
                save(run, step)

        pid = fork(work)
        time.sleep(rng.uniform(0.01, 0.25))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        found = find_checkpoint(run)
        assert found.step >= last and same(found, found.step)


def test_random_kills(run):
    check_random_kills(run, 5, seed=0)


@pytest.mark.slow
def test_100_random_kills(run):
    check_random_kills(run, 100, seed=1)


# ---------------------------------------------------------------- two runs
def hold(run, ready):
    def work():
        with RunLock(run):
            os.write(ready, b"x")
            time.sleep(60)

    return fork(work)


def test_lock_names_holder_and_dies_with_it(tmp_path):
    out, ready = os.pipe()
    pid = hold(tmp_path, ready)
    os.read(out, 1)
    began = time.monotonic()
    with pytest.raises(CheckpointError, match=f"process {pid} "):
        RunLock(tmp_path).__enter__()
    assert time.monotonic() - began < 5
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with RunLock(tmp_path):
        pass


def test_a_forked_child_does_not_keep_the_lock_of_its_killed_parent(tmp_path):
    out, ready = os.pipe()

    def work():
        with RunLock(tmp_path):
            child = fork(lambda: time.sleep(60))  # a loader's worker
            os.write(ready, child.to_bytes(4, "big"))
            time.sleep(60)

    parent = fork(work)
    child = int.from_bytes(os.read(out, 4), "big")
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    try:
        os.kill(child, 0)  # it is still there
        with RunLock(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


def test_races_have_one_winner(tmp_path):
    for race in range(20):

        def work():
            try:
                with RunLock(tmp_path / "run"):
                    (tmp_path / f"{race}-won-{os.getpid()}").touch()
                    end = time.monotonic() + 10
                    while len(list(tmp_path.glob(f"{race}-lost-*"))) < 2 and time.monotonic() < end:
                        time.sleep(0.01)
            except CheckpointError:
                (tmp_path / f"{race}-lost-{os.getpid()}").touch()

        for pid in [fork(work) for _ in range(3)]:
            os.waitpid(pid, 0)
        assert len(list(tmp_path.glob(f"{race}-won-*"))) == 1
        assert len(list(tmp_path.glob(f"{race}-lost-*"))) == 2


def test_config_difference_names_everything():
    there, here = {"a": {"b": 1, "c": [1, 2]}, "d": 0}, {"a": {"b": 2, "c": (1, 2)}, "e": None}
    assert ck.config_difference(there, here) == [
        "a.b: 1 there, 2 here",
        "d: 0 there, 'absent' here",
    ]
    assert ck.config_difference(there, here, ignore=("a.b", "d")) == []
