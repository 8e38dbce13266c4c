"""Several real processes, one run: the same numbers as one process, and faults that only one sees.

Most ranks are forked from a server that has imported everything once, since an import takes longer
than a run; the tests of the launcher start `torchrun` on this file. All talk gloo on 127.0.0.1.
"""

import atexit
import errno
import hashlib
import json
import math
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from cmmd.checkpoint import CheckpointError, find_checkpoint
from cmmd.contrastive import ContrastiveConfig, ContrastiveLossFn
from cmmd.core import ClipSpec, make_generator
from cmmd.datasets import ClipDataset
from cmmd.train import StepData, TrainConfig, TrainError, clip_index, joint_loss_fn, train
from cmmd.unet import CMMDUNet, UNetConfig

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(  # what a rank needs and may import late
    [
        "pytest",
        "torch._dynamo",
        "torch.utils.tensorboard",
        "cmmd.contrastive",
        "cmmd.train",
        "cmmd.unet",
    ]
)
CONTRAST = ContrastiveLossFn(ContrastiveConfig(weight=0.05, negatives="mixture"))
TIMES = ("clips_per_s", "memory", "seconds")  # no two runs share these


# ---------------------------------------------------------------- what every rank builds
@dataclass(frozen=True)
class Settings:
    num_train_steps: int = 1000
    audio_snr_scale: float = 1 / 40
    clip: ClipSpec = field(default_factory=lambda: ClipSpec.toy(n_frames=6))


class Pair(nn.Module):
    "The smallest model of two streams that look at each other; it can be told to be slow."

    def __init__(self, delay: float = 0.0):
        super().__init__()
        self.config, self.delay = Settings(), delay
        self.video, self.audio, self.cross = nn.Linear(4, 4), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, video, audio, t):
        time.sleep(self.delay)
        here = self.video(video.movedim(2, -1)) + self.cross(audio.mean(-1))[:, None, None, None]
        there = self.audio(audio.transpose(1, 2)).transpose(1, 2)
        return here.movedim(-1, 2), there * (t / 1000)[:, None, None]


def network() -> CMMDUNet:
    "The real network, as small as it gets."
    return CMMDUNet(
        UNetConfig.tiny(
            video_channels=(16, 32),
            audio_channels=(80, 96),
            head_dim=16,
            time_embed_dim=32,
            clip=ClipSpec.toy(n_frames=6),
        )
    )


def clips(*, n: int = 64, mels: int = 8, size: int = 2) -> ClipDataset:
    "Random clips of 6 frames; no clip comes twice in the first 16 steps of 4."
    g = make_generator(0, "test data")
    return ClipDataset(
        torch.randn(n, 6, 4, size, size, generator=g),
        torch.randn(n, mels, 38, generator=g),
        tuple(f"clip{i}" for i in range(n)),
        0.0,
        1.0,
    )


class Sick:
    "Clips of which some were not checked."

    def __init__(self, data: ClipDataset, bad: set):
        self.data, self.bad = data, bad
        self.ids, self.fingerprint = data.ids, "sick"

    def __len__(self):
        return len(self.data)

    def batch(self, indices):
        video, audio = self.data.batch(indices)
        for place, i in enumerate(indices):
            audio[place, 0, 0] = math.nan if i in self.bad else audio[place, 0, 0]
        return video, audio


def config(**changes) -> TrainConfig:
    "Steps enough for several checkpoints; the schedule lets a run go on longer."
    given = {"steps": 12, "batch_size": 4, "schedule": "paper", "log_every": 5, "save_every": 4}
    return TrainConfig.tiny(**given | changes)


def digest(*models: nn.Module) -> str:
    "Of all weights."
    found = hashlib.sha256()
    for p in (p for m in models for p in m.parameters()):
        found.update(p.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


class Watched:
    "A loss that notes what it saw, and arms the trouble at its step."

    def __init__(self, loss, trouble):
        self.loss, self.trouble, self.seen, self.model, self.__name__ = loss, trouble, [], None, "x"

    def __call__(self, model, batch):
        self.trouble.step = batch.step
        if not self.seen:
            (self.trouble.folder / f"rank{os.environ.get('RANK', 0)}.on").touch()
        self.seen.append([batch.step, batch.positions, batch.ids, batch.t.tolist()])
        self.seen[-1] += [hashlib.sha256(batch.audio_noise.numpy().tobytes()).hexdigest()]
        self.seen[-1] += [digest(self.model)]
        return self.loss(model, batch)


class Trouble:
    "A disk that is slow or full from a step on, seen where every save waits for it: in fsync."

    def __init__(self, folder: Path, *, kind: str = "", at: int = 0, rank: int = 0):
        self.folder, self.kind, self.at, self.step, self.real = folder, kind, at, -1, os.fsync
        if kind and rank == 0:
            os.fsync = self.fsync

    def fsync(self, fd):
        if self.step >= self.at and self.kind == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self.step >= self.at and not (self.folder / "saving").exists():
            (self.folder / "saving").touch()
            time.sleep(3)
        return self.real(fd)


def work(
    folder: str,
    *,
    real: bool = False,  # the real network
    contrast: bool = False,
    bad: tuple = (),  # places of clips with a NaN
    trouble: dict | None = None,
    delay: float = 0.0,
    resume: bool = False,
    again: bool = False,  # and a second run in the same process
    **changes,  # of the configuration
) -> int:
    "What a rank does: train, and write down what came of it. The exit code is a command line's."
    folder, rank = Path(folder), int(os.environ.get("RANK", 0))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = network() if real else Pair(delay)
    data = clips(mels=80 if real else 8, size=8 if real else 2)
    watched = Watched(
        CONTRAST if contrast else joint_loss_fn, Trouble(folder, rank=rank, **trouble or {})
    )
    watched.model = model
    options = {"config": config(**changes), "loss_fn": watched, "device": "cpu"}
    data, said = Sick(data, set(bad)) if bad else data, {"pid": os.getpid(), "seen": watched.seen}
    try:
        held = clips(n=8, mels=80 if real else 8, size=8 if real else 2)
        result = train(model, data, out_dir=folder / "run", resume=resume, held_out=held, **options)
        said |= {"step": result.step, "skipped": result.skipped, "stopped": result.stopped}
        said |= {"model": digest(model), "ema": digest(result.ema_model)}
        if again:
            said["seen"] = watched.seen.copy()
            said["again"] = digest(train(model, data, **options).model)
    except (TrainError, CheckpointError, ValueError) as e:
        print(e, file=sys.stderr, flush=True)
        return 1
    finally:
        (folder / f"rank{rank}.json").write_text(json.dumps(said))
    return 0


# ---------------------------------------------------------------- starting and ending ranks
def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def rank_main(rank: int, world: int, port: int, folder: str, options: dict) -> None:
    "A forked process becomes one rank: what a launcher would have set, and its own stderr."
    if world > 1:
        os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{world}"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
    os.environ |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    errors = os.open(f"{folder}/rank{rank}.err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(errors, 1), os.dup2(errors, 2)
    sys.exit(work(folder, **options))


class Ranks:
    "The processes of one run, none of which outlives the test: `with Ranks(folder, ...) as run:`."

    def __init__(self, folder: Path, *, world: int = 2, **options):
        self.folder, port = folder, free_port()
        folder.mkdir(parents=True, exist_ok=True)
        for old in (*folder.glob("rank*"), folder / "saving"):
            old.unlink(missing_ok=True)
        self.processes = [
            SERVER.Process(target=rank_main, args=(r, world, port, str(folder), options))
            for r in range(world)
        ]
        for p in self.processes:
            p.start()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for p in self.processes:
            p.kill()
            p.join()

    def wait(self, seconds: float = 60.0) -> list[int]:
        "The exit codes; all ranks must have ended by themselves."
        end = time.monotonic() + seconds
        for p in self.processes:
            p.join(max(0.0, end - time.monotonic()))
        codes = [p.exitcode for p in self.processes]
        assert None not in codes, (f"still running after {seconds} s", codes, self.said())
        return codes

    def done(self) -> "Ranks":
        "After a good end."
        codes = self.wait(120)
        assert not any(codes), (codes, self.said())
        return self

    def said(self) -> list[list[str]]:
        "Each rank's lines on the screen, without what PyTorch's C++ logs of a lost connection."
        texts = [(self.folder / f"rank{i}.err") for i in range(len(self.processes))]
        lines = [t.read_text(errors="replace").splitlines() if t.exists() else [] for t in texts]
        theirs = ("[W", "[rank", "Exception raised from", "frame #", "<omitting")
        return [[x for x in given if x.strip() and not x.startswith(theirs)] for given in lines]

    def joined(self) -> None:
        "Until all ranks train: before they have met, only a launcher can know that one is dead."
        names = [self.folder / f"rank{i}.on" for i in range(len(self.processes))]
        until(lambda: all(name.exists() for name in names))

    def left(self, rank: int) -> dict:
        "What a rank wrote down."
        return json.loads((self.folder / f"rank{rank}.json").read_text())

    @property
    def saved(self):
        "The newest checkpoint: weights, averages, optimiser, sums."
        return find_checkpoint(self.folder / "run")


def launch(folder: Path, **options) -> Ranks:
    "A run from start to end."
    with Ranks(folder, **options) as run:
        return run.done()


def until(happened, seconds: float = 60.0) -> None:
    "Wait for a file, a checkpoint."
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def history(run: Ranks) -> list[dict]:
    "The metrics on disk without what depends on the clock."
    lines = (run.folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if not k.startswith(TIMES)} for line in lines
    ]


def distance(a: Ranks, b: Ranks) -> float:
    "The largest difference between any two numbers of two checkpoints' weights and averages."
    a, b = a.saved.tensors, b.saved.tensors
    return max(
        float((a[group][k] - b[group][k]).abs().max())
        for group in ("model", "ema")
        for k in a[group]
    )


def assert_equal(a: Ranks, b: Ranks) -> None:
    "Equal bit for bit: weights, averages, optimiser, counters, metrics."
    one, two = a.saved, b.saved
    states = [{k: v for k, v in x.state.items() if k != "processes"} for x in (one, two)]
    assert one.step == two.step and states[0] == states[1]
    assert {g: set(t) for g, t in one.tensors.items()} == {
        g: set(t) for g, t in two.tensors.items()
    }
    for group, tensors in one.tensors.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, two.tensors[group][name]), (group, name)
    assert history(a) == history(b)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "The uninterrupted run of one process with two pieces that most tests are judged by."
    folder = tmp_path_factory.mktemp("whole")
    return launch(folder, world=1, contrast=True, gradient_accumulation=2)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    "The same by two processes."
    return launch(tmp_path_factory.mktemp("two"), contrast=True, again=True, num_workers=1)


# ---------------------------------------------------------------- equal numbers
def test_two_processes_equal_two_pieces(whole, two):
    assert_equal(whole, two)
    ranks = [two.left(r) for r in (0, 1)]
    for name in ("step", "skipped", "stopped", "model", "ema", "again"):
        assert ranks[0][name] == ranks[1][name], name
    assert ranks[0]["model"] == whole.left(0)["model"] and ranks[0]["ema"] == whole.left(0)["ema"]


def test_the_real_network_too(tmp_path):
    options = {"real": True, "contrast": True, "steps": 3, "log_every": 1, "learning_rate": 1e-3}
    pieces = launch(tmp_path / "one", world=1, gradient_accumulation=2, **options)
    assert_equal(pieces, launch(tmp_path / "two", **options))
    again = launch(tmp_path / "again", gradient_checkpointing=True, **options)
    assert_equal(pieces, again)
    full = launch(tmp_path / "full", world=1, **options)
    assert 0 < distance(pieces, full) < 1e-3


def test_one_full_batch_is_nearly_the_same(whole, tmp_path):
    full = launch(tmp_path, world=1, contrast=True)
    assert distance(whole, full) < 1e-6  # 12 steps of rates up to 1e-3


def stream(run: Ranks) -> list:
    "What all ranks saw of every step: positions, names, noise levels, in order."
    parts = [part[:4] for i in range(len(run.processes)) for part in run.left(i)["seen"]]
    rows = [(step, *row) for step, *given in parts for row in zip(*given)]
    return sorted(map(list, rows))


def test_the_order_is_the_same_for_any_number_of_processes(whole, two):
    assert stream(whole) == stream(two) and len(stream(two)) == 12 * 4
    noise = [
        {tuple(x[1]): x[4] for r in range(n) for x in run.left(r)["seen"]}
        for run, n in ((whole, 1), (two, 2))
    ]
    assert noise[0] == noise[1]
    data, c = clips(n=11), config(batch_size=8)
    for step in (0, 5):
        want = [list(b.positions) for b in StepData(data, c, num_train_steps=1000)[step]]
        for world, pieces in ((2, 1), (4, 1), (8, 1), (2, 4), (1, 8)):
            d = replace(c, gradient_accumulation=pieces)
            got = [
                b
                for r in range(world)
                for b in StepData(data, d, num_train_steps=1000, rank=r, world=world)[step]
            ]
            assert sorted(sum((list(b.positions) for b in got), [])) == want[0]


@pytest.mark.parametrize("before,after", [(2, 1), (1, 2)])
def test_resume_with_another_number_of_processes(whole, tmp_path, before, after):
    launch(tmp_path, world=before, contrast=True, steps=4, gradient_accumulation=2 // before)
    options = {"contrast": True, "gradient_accumulation": 2 // after, "resume": True}
    assert_equal(whole, launch(tmp_path, world=after, **options))


# ---------------------------------------------------------------- faults of one rank
def one_line(lines: list[str], *words: str) -> None:
    assert len(lines) == 1, lines
    for word in words:
        assert word in lines[0], (word, lines)


def killed(run: Ranks, rank: int, seconds: float = 60.0) -> None:
    "kill -9 for one rank: the other ends, with one line."
    run.processes[rank].kill()
    codes = run.wait(seconds)
    assert codes[rank] == -signal.SIGKILL and codes[1 - rank] == 1, (codes, run.said())
    one_line([x for x in run.said()[1 - rank] if not x.startswith("no checkpoint in")])


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_other_and_costs_nothing(whole, tmp_path, rank):
    options = {"contrast": True, "delay": 0.03}
    with Ranks(tmp_path, **options) as run:  # between two steps
        until(lambda: (tmp_path / "run" / "step_00000004").exists())
        time.sleep(0.1)
        killed(run, rank)
    slow = {"kind": "slow", "at": 7}
    with Ranks(tmp_path, resume=True, trouble=slow, **options) as run:  # while rank 0 saves
        until((tmp_path / "saving").exists)
        killed(run, rank)
    # rank 0 lives on in one case, and has written what it was writing
    assert find_checkpoint(tmp_path / "run").step == (4 if rank == 0 else 8)
    end = launch(tmp_path, world=1, contrast=True, gradient_accumulation=2, resume=True)
    assert_equal(whole, end)
    assert not list((tmp_path / "run").glob("*.tmp-*"))


def kill_often(folder: Path, n: int, seed: int) -> Ranks:
    "A run that is killed n times, anywhere, and goes on each time."
    rng, options = random.Random(seed), {"contrast": True, "steps": 60, "save_every": 3}
    for i in range(n):
        with Ranks(folder, resume=True, delay=0.2, **options) as run:
            run.joined()
            time.sleep(rng.uniform(0.0, 1.5))
            killed(run, rng.randrange(2))
        assert not (folder / "run" / "model").exists()  # not yet at the end
    return launch(folder, resume=True, **options)


@pytest.mark.slow
def test_10_kills_anywhere_cost_nothing(tmp_path):
    options = {"contrast": True, "steps": 60, "save_every": 3}
    whole = launch(tmp_path / "whole", world=1, gradient_accumulation=2, **options)
    assert_equal(whole, kill_often(tmp_path / "killed", 10, seed=0))


def test_nan_in_a_clip_of_one_rank(tmp_path):
    steps = (2, 5, 6, 9, 10, 11)
    bad = tuple(clip_index(4 * s + 3, n_clips=64, seed=0) for s in steps)  # all of rank 1
    with Ranks(tmp_path / "two", bad=bad, steps=16) as run:
        assert run.wait() == [1, 1], run.said()
    for rank in (0, 1):
        before = {x[0]: x[5] for x in run.left(rank)["seen"]}  # the weights when a step begins
        for s in range(11):
            assert (before[s] == before[s + 1]) == (s in steps), s
        one_line(run.said()[rank], "step 11", f"clip{bad[-1]}", "not finite")
    assert run.left(0)["seen"][-1][5] == run.left(1)["seen"][-1][5]
    with Ranks(tmp_path / "one", world=1, bad=bad, steps=16, gradient_accumulation=2) as alone:
        assert alone.wait() == [1], alone.said()
    one_line(alone.said()[0], "step 11", f"clip{bad[-1]}")
    assert_equal(alone, run)


def test_a_full_disk_on_rank_0_ends_both(whole, tmp_path):
    with Ranks(tmp_path, contrast=True, trouble={"kind": "full", "at": 7}) as run:
        assert run.wait() == [1, 1], run.said()
    for lines in run.said():
        one_line(lines, "No space left", "step_00000008")
    assert find_checkpoint(tmp_path / "run").step == 4
    end = launch(tmp_path, world=1, contrast=True, gradient_accumulation=2, resume=True)
    assert_equal(whole, end)


def race(folder: Path) -> float:
    "Two runs want one folder; how long the loser took to say so."
    (folder / "b").mkdir(parents=True)
    (folder / "b" / "run").symlink_to(folder / "a" / "run")
    (folder / "a" / "run").mkdir(parents=True)
    options = {"steps": 400, "delay": 0.05}
    with Ranks(folder / "a", **options) as a, Ranks(folder / "b", **options) as b:
        until(lambda: any(p.exitcode is not None for r in (a, b) for p in r.processes))
        began = time.monotonic()
        winner, loser = (a, b) if any(p.exitcode is not None for p in b.processes) else (b, a)
        assert loser.wait() == [1, 1], loser.said()
        took = time.monotonic() - began
        for lines in loser.said():
            one_line(lines, f"in use by process {winner.processes[0].pid} ")
        until(lambda: (folder / "a" / "run" / "metrics.jsonl").exists())
        os.kill(winner.processes[1].pid, signal.SIGTERM)  # any rank may be told to stop
        winner.done()
    stopped = [winner.left(r) for r in (0, 1)]
    assert stopped[0]["stopped"] == stopped[1]["stopped"] == "SIGTERM"
    assert winner.saved.step == stopped[0]["step"] == stopped[1]["step"] < 400
    return took


def test_two_runs_on_one_folder_have_one_winner(tmp_path):
    assert race(tmp_path) < 5


@pytest.mark.slow
def test_20_races(tmp_path):
    assert max(race(tmp_path / str(i)) for i in range(20)) < 5


# ---------------------------------------------------------------- under a launcher
class Launched:
    "torchrun with two processes, in a session of its own so that none can hide."

    def __init__(self, folder: Path, **options):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        given = [str(folder), json.dumps(options)]
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
        command += ["--master_addr=127.0.0.1", f"--master_port={free_port()}", __file__, *given]
        env = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        env |= {"PYTHONPATH": str(Path(__file__).parent)}
        with open(folder / "screen.txt", "w") as screen:
            self.process = subprocess.Popen(
                command, env=env, stdout=screen, stderr=screen, start_new_session=True
            )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for pid in self.session():
            os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def session(self) -> list[int]:
        "The processes of the launcher's session that are not yet gone."
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
            except OSError:
                continue
            if int(session) == self.process.pid and state != "Z":
                found.append(int(stat.parent.name))
        return found

    def ranks(self) -> list[int]:
        "The process ids of ranks 0 and 1 once both have started; they need not have met."
        names = [self.folder / f"pid{r}" for r in (0, 1)]
        until(lambda: all(p.exists() and p.read_text() for p in names), 120)
        return [int(p.read_text()) for p in names]

    def left(self, rank: int) -> dict:
        return json.loads((self.folder / f"rank{rank}.json").read_text())


def test_sigterm_to_the_launcher_saves_and_ends_all(whole, tmp_path):
    with Launched(tmp_path, contrast=True, delay=0.1) as run:
        run.ranks()
        until(lambda: (tmp_path / "run" / "step_00000004").exists(), 120)
        began = time.monotonic()
        run.process.terminate()
        run.process.wait(60)
        took = time.monotonic() - began
        assert not run.session() and took < 10, (tmp_path / "screen.txt").read_text()[-2000:]
    stopped = [run.left(r) for r in (0, 1)]
    assert stopped[0]["stopped"] and stopped[0]["step"] == stopped[1]["step"] < 12
    assert find_checkpoint(tmp_path / "run").step == stopped[0]["step"]
    for rank in (0, 1):  # nothing is left to complain about
        assert (tmp_path / f"group{rank}").read_text() == "gone"
    end = launch(tmp_path, world=1, contrast=True, gradient_accumulation=2, resume=True)
    assert_equal(whole, end)


@pytest.mark.slow
@pytest.mark.parametrize("rank,meet", [(0, True), (1, True), (0, False), (1, False)])
def test_a_killed_rank_ends_the_launcher(whole, tmp_path, rank, meet):
    with Launched(tmp_path, contrast=True, delay=0.1, num_workers=1) as run:
        pids = run.ranks()
        if meet:
            until(lambda: (tmp_path / "run" / "step_00000004").exists(), 120)
        began = time.monotonic()
        os.kill(pids[rank], signal.SIGKILL)
        assert run.process.wait(60) != 0 and time.monotonic() - began < 60
        until(lambda: not run.session(), 30)
    end = launch(tmp_path, world=1, contrast=True, gradient_accumulation=2, resume=True)
    assert_equal(whole, end)


if __name__ == "__main__":  # a rank of torchrun
    where, wanted = sys.argv[1:]

    def last():  # at exit, after all that `train` has to do there
        there = "there" if torch.distributed.is_initialized() else "gone"
        Path(where, f"group{os.environ['RANK']}").write_text(there)

    atexit.register(last)
    Path(where, f"pid{os.environ['RANK']}").write_text(str(os.getpid()))
    sys.exit(work(where, **json.loads(wanted)))
