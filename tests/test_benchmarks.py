"""The benchmarks' own logic, without a GPU: graphs that are none, processes that fail."""

import argparse
import importlib
import json
import sys
import time

import pytest
import torch
from project import ROOT

from cmmd.unet import UNetConfig


@pytest.fixture
def script(monkeypatch):
    "One of benchmarks/*.py as a module."
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if (
            getattr(sys.modules[name], "__file__", None)
            and "benchmarks" in sys.modules[name].__file__
        ):
            del sys.modules[name]


SMALL = {"video_channels": (16, 32), "audio_channels": (80, 96), "n_blocks": 1, "head_dim": 16}


def network_of(script, way="float32"):
    config = UNetConfig.tiny(**SMALL, time_embed_dim=64)
    return script("gpu").AsCalled(script("network").awake(config), way, "cpu")


class Replay:
    "A graph that does what a graph should: the same work on what lies in its inputs now."

    def __init__(self, run):
        self.run, self.output = run, run().clone()

    def replay(self):
        self.output = self.run()


class Frozen(Replay):
    "One that ignores every input."

    def replay(self):
        pass


# ---- the check of a recorded step
def test_a_graph_that_follows_its_inputs_passes(script):
    x = script("network").paper_inputs(8)
    with torch.no_grad():
        assert script("gpu").check_recorded(network_of(script), x, Replay) < 1e-5


def test_a_graph_that_ignores_its_inputs_is_found_out(script):
    x = script("network").paper_inputs(8)
    with torch.no_grad(), pytest.raises(AssertionError, match="another z the replay is"):
        script("gpu").check_recorded(network_of(script), x, Frozen)


@pytest.mark.parametrize("forgotten", ["z", "n", "levels"])
def test_a_graph_that_ignores_one_input_is_found_out(script, monkeypatch, forgotten):
    gpu = script("gpu")
    kept, replaying, step = {}, [], gpu.guided_step

    def guided_step(model, z, t, *, levels, **given):
        now = {"z": z, "n": t, "levels": levels}
        if replaying:
            now[forgotten] = kept[forgotten]
        return step(model, now["z"], now["n"], levels=now["levels"], **given)

    class Forgetful(Replay):
        def __init__(self, run):
            inner = run.__closure__  # of RecordedStep.step: the step whose inputs these are
            owner = next(c.cell_contents for c in inner if hasattr(c.cell_contents, "levels"))
            kept.update(z=owner.z.clone(), n=owner.t.clone(), levels=owner.levels.clone())
            super().__init__(run)

        def replay(self):
            replaying.append(True)
            super().replay()
            replaying.clear()

    monkeypatch.setattr(gpu, "guided_step", guided_step)
    x = script("network").paper_inputs(8)
    with torch.no_grad(), pytest.raises(AssertionError, match=f"another {forgotten} the"):
        gpu.check_recorded(network_of(script), x, Forgetful)


# ---- the ways
def test_every_way_answers_in_float32_and_nearly_alike(script):
    x = script("network").paper_inputs(8)
    gpu = script("gpu")
    with torch.no_grad():
        plain = network_of(script)(*x)
        for way in gpu.WAYS:
            model = network_of(script, way)
            for made, true in zip(model(*x), plain):
                assert made.dtype == torch.float32
                assert (made - true).norm() < 0.05 * true.norm()
            weights = {p.dtype for p in model.parameters()}
            assert weights == {gpu.WAYS[way][0]}
            assert script("network").sound_gradient(model, *x).isfinite().all()


@pytest.fixture
def pretended(script, monkeypatch):
    "gpu.py on the CPU: a tiny network, no clock, graphs that are none."
    gpu = script("gpu")
    config = UNetConfig.tiny(**SMALL, time_embed_dim=64)
    monkeypatch.setattr(gpu, "awake_paper", lambda: script("network").awake(config))
    monkeypatch.setattr(gpu, "milliseconds", lambda run: run() is not None or 2.0)
    monkeypatch.setattr(gpu, "record", Replay)
    monkeypatch.setattr(gpu, "gpu_ceilings", lambda dtype: {"matmul": 800.0, "conv": 400.0})
    monkeypatch.setattr(gpu, "paper_operations", lambda size: (1, 4e9))
    return gpu


def test_the_rows_of_a_way(pretended):
    with torch.no_grad():
        rows = {
            name: (value, unit) for name, value, unit in pretended.way_rows("bf16", (8,), "cpu")
        }
    at = "CUDA bf16 8x8"
    whats = ("forward", "forward + backward to the sound", "guided step")
    for what in whats:
        assert {f"{at}: {what}, {how}" for how in ("eager", "captured")} < set(rows)
        assert rows[f"{at}: {what}, captured over eager"][1] == "x"
    assert rows["CUDA bf16: conv ceiling"] == (400.0, "TFLOP/s")
    assert rows[f"{at}: error of a replayed step"][0] < 1
    assert all(value is not None for value, _ in rows.values())


def test_a_capture_that_fails_leaves_the_eager_rows(pretended, monkeypatch, capsys):
    def refuses(run):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(pretended, "record", refuses)
    with torch.no_grad():
        rows = list(pretended.way_rows("float32", (8, 16), "cpu"))
    failed = {name: why for name, value, why in rows if value is None}
    assert set(failed) == {
        f"CUDA float32 {s}: {what}"
        for s in ("8x8", "16x16")
        for what in ("error of a replayed step", "captured")
    }
    assert set(failed.values()) == {
        "RuntimeError: operation not permitted when stream is capturing"
    }
    assert sum(name.endswith(", eager") for name, *_ in rows) == 6
    assert "Traceback" in capsys.readouterr().err


class Echo(torch.nn.Module):
    "A network that was compiled into nonsense."

    def forward(self, video, audio, t):
        return video, audio


def test_a_compiled_network_is_compared_and_timed(pretended, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda net, **_: net)
    with torch.no_grad():
        names = [row[0] for row in pretended.compiled_rows("bf16-tuned", "default", 8, "cpu")]
        assert names[1] == "CUDA bf16-tuned 8x8: forward, compiled (default) and captured"
        monkeypatch.setattr(torch, "compile", lambda net, **_: Echo())
        wrong = pretended.guarded("compiled", pretended.compiled_rows("bf16", "default", 8, "cpu"))
        assert "% off" in list(wrong)[-1][2]


# ---- a process for each way
def printing(*lines):
    "A process that prints these lines, then goes on as the last one says."
    *rows, then = lines
    program = "".join(f"print({row!r}, flush=True)\n" for row in rows)
    return [sys.executable, "-c", f"{program}{then}"]


ROW = '["CUDA a", 1.5, "ms"]'


def test_rows_of_a_process_that_fails_are_kept(script, capsys):
    command = printing("a warning", ROW, "raise SystemExit(3)")
    rows = list(script("gpu").from_process(command, name="CUDA: process", limit=60))
    assert rows == [("CUDA a", 1.5, "ms"), ("CUDA: process", None, "ended with 3")]
    assert "a warning" in capsys.readouterr().err


def test_rows_of_a_process_that_hangs_are_kept_even_if_its_children_hold_the_pipe(script):
    wait = (
        f"import subprocess as s; s.run([{sys.executable!r}, '-c', 'import time; time.sleep(99)'])"
    )
    began = time.monotonic()
    rows = list(script("gpu").from_process(printing(ROW, wait), name="slow", limit=3))
    assert rows == [("CUDA a", 1.5, "ms"), ("slow", None, "longer than 3 s")]
    assert time.monotonic() - began < 30


def test_a_process_that_ends_well_has_no_more_to_say(script):
    rows = script("gpu").from_process(printing(ROW, "pass"), name="fine", limit=60)
    assert list(rows) == [("CUDA a", 1.5, "ms")]


def test_every_job_names_what_gpu_py_takes(script, monkeypatch):
    gpu, jobs = script("gpu"), []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "from_process", lambda command, **_: jobs.append(command) or [])
    assert list(gpu.bench_gpu(gpu.WAYS, limit=9)) == []
    assert [job[2:] for job in jobs] == [["--way", way] for way in gpu.WAYS]
    jobs.clear()
    list(gpu.bench_gpu(["bf16-tuned", "autocast"], modes=gpu.MODES))
    assert len(jobs) == 4 and jobs[0][2:] == (
        ["--way", "bf16-tuned", "--mode", "default", "--size", "16"]
    )


# ---- speed.py
@pytest.mark.parametrize("only", [["gpu"], ["cpu"], ["cpu", "gpu"], ["compiled"], None])
def test_only_what_is_asked_for_is_run(script, monkeypatch, only):
    speed, ran = script("speed"), []
    for name in ("parts", "paper", "small_latents", "bf16"):
        monkeypatch.setattr(speed, f"bench_{name}", lambda *_, name=name: ran.append(name) or [])
    monkeypatch.setattr(speed, "paper_size", lambda size: [])

    def gpu(ways, *, limit, modes=()):
        ran.append("compiled" if modes else "gpu")
        return []

    monkeypatch.setattr(speed, "bench_gpu", gpu)
    asked = ["--size", "16"] + (["--only", *only] if only else [])
    asked = speed.arguments().parse_args(asked)
    assert list(speed.all_rows(asked)) == []
    cpu = ["parts", "paper", "small_latents", "bf16"]
    want = only or ["cpu", "gpu", "compiled"]
    assert ran == (cpu if "cpu" in want else []) + [p for p in want if p != "cpu"]


def test_single_layers_in_bf16_are_rows(script):
    rows = list(script("speed").bench_bf16(1))
    assert len(rows) == 3 and all(value > 0 and unit == "x" for _, value, unit in rows)


def test_the_row_of_bf16_says_what_onednn_does(script):
    speed = script("speed")
    can = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    unit = speed.bf16_units()
    assert unit.startswith(torch.backends.cpu.get_cpu_capability())
    assert unit.endswith("oneDNN does bf16" if can else "oneDNN refuses bf16")


def test_a_part_that_fails_does_not_hinder_the_rest(script, monkeypatch, tmp_path, capsys):
    speed, out = script("speed"), tmp_path / "there" / "bench.json"

    def fails(*_):
        yield "first", 1.0, "s"
        assert len(json.loads(out.read_text())["figures"]) == 1  # written row by row
        raise ValueError("no luck\nhere")

    for name in ("paper", "small_latents", "bf16"):
        monkeypatch.setattr(speed, f"bench_{name}", lambda *_: [])
    monkeypatch.setattr(speed, "paper_size", lambda size: [])
    monkeypatch.setattr(speed, "bench_parts", fails)
    monkeypatch.setattr(speed, "bench_gpu", lambda *_, **how: [("CUDA b", 3.0, "x")])
    report = {"about": {}}
    speed.measure(
        speed.all_rows(speed.arguments().parse_args(["--only", "cpu", "gpu"])), report, out
    )
    stored = json.loads(out.read_text())
    assert stored["figures"] == {"first": [1.0, "s"], "CUDA b": [3.0, "x"]}
    assert stored["failed"] == {"parts": "ValueError: no luck"}
    assert "FAILED ValueError: no luck" in capsys.readouterr().out


def test_a_written_file_becomes_lines_of_the_history_that_name_the_gpu(script, tmp_path):
    speed, page = script("speed"), tmp_path / "README.md"
    page.write_text("| table |\n<!-- end of the history -->\nafter\n")
    step = "CUDA bf16-tuned 16x16: guided step, captured over eager"
    about = {"date": "d", "machine": "m", "gpu": "H 80 GiB", "torch": "2", "command": "speed.py"}
    figures = {step: (3.5, "x"), "CUDA bf16: conv ceiling": (1.0, "T"), "toy world": (1.0, "s")}
    speed.add_history({"about": about, "figures": figures}, page)
    assert page.read_text().splitlines() == [
        "| table |",
        f"| d | m, H 80 GiB, torch 2 | `speed.py` | {step} | 3.5 x |",
        "<!-- end of the history -->",
        "after",
    ]
    assert step in speed.TARGETS


def test_results_name_the_gpu(script, monkeypatch):
    common = script("common")
    assert "gpu" not in common.about_machine() or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    memory = argparse.Namespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    assert common.about_machine()["gpu"] == "NVIDIA H100 80 GiB"


# ---- train.py
@pytest.fixture
def on_cuda(script, monkeypatch):
    "train.py that believes in a GPU: steps of 1, 2, 3 .. seconds of wall, 0.01 of CPU."
    train, device = script("train"), torch.device("cuda")
    monkeypatch.setattr(train, "pick_device", lambda name: device)
    monkeypatch.setattr(train, "has_bf16", lambda device: True)
    monkeypatch.setattr(train, "make_trainer", lambda args: None)
    monkeypatch.setattr(train, "negatives_cost", lambda trainer: 0.1)
    clock = iter(range(1, 100))
    step = lambda trainer, name: {"cpu": 0.01, "wall": float(next(clock))}  # noqa: E731
    monkeypatch.setattr(train, "timed_step", step)
    memory = {"peak": 8, "resets": 0}

    def reset(_):
        memory.update(peak=2 << 30, resets=memory["resets"] + 1)

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: memory["peak"])
    return train, memory


def test_on_cuda_a_step_is_timed_by_the_wall_after_two_that_warm_up(on_cuda):
    train, memory = on_cuda
    asked = argparse.Namespace(device="auto", only=None, steps=6, batch_size=2)
    row = train.measure(asked)
    assert row["plain"]["wall_s"] == 8 and row["contrastive"]["wall_s"] == 9  # of 5, 7, 9, 11
    assert row["ratio"] == 9 / 8 and row["plain"]["clips_per_s"] == 2 / 8
    assert row["plain"]["peak_gib"] == 2 and memory["resets"] == 2
    about = {"config": "tiny", "batch_size": 2, "checkpointing": False, "precision": "bf16"}
    table = train.lines(about | row | {"estimate_gib": {"plain": 1, "contrastive": 2}}, "wall_s")
    assert [line.split()[5] for line in table] == ["8", "9"]


def test_on_cuda_every_row_has_rounds_to_warm_up_and_memory_is_that_of_bf16(on_cuda, monkeypatch):
    train, _ = on_cuda
    monkeypatch.setattr(train, "child", lambda args, **how: how)
    asked = argparse.Namespace(
        device="auto", configs=["paper", "paper-64"], steps=None, batch_size=None, only=None
    )
    rows = list(train.rows(asked))
    assert all(row["steps"] >= 6 and not row["long"] for row in rows)
    assert {row["precision"] for row in rows if row["batch_size"] > 1} == {"bf16"}
    monkeypatch.setattr(train, "pick_device", lambda name: torch.device("cpu"))
    rows = list(train.rows(asked))
    assert {row["steps"] for row in rows if row["batch_size"] > 1} == {1}
    assert {row["precision"] for row in rows if row["batch_size"] > 1} == {"no"}


# ---- loader.py
def test_configs_with_the_same_clips_share_what_is_read(script, monkeypatch):
    loader, made = script("loader"), []
    monkeypatch.setattr(loader, "make_folder", lambda root, clip, n: made.append(clip) or clip)
    speed = {"clips_per_s": 100.0}
    monkeypatch.setattr(loader, "loader_speed", lambda data, **how: speed)
    rates = {"tiny": 50.0, "small": 5.0, "paper": 0.5}
    monkeypatch.setattr(loader, "training_speed", lambda name, data, **how: rates[name])
    rows = list(loader.measure(["tiny", "small", "paper"], 8))
    assert len(made) == 2 and len(rows) == 12
    assert [row["times"] for row in rows[::4]] == [2, 20, 200]
    assert {row["config"]: row["training"] for row in rows} == rates
