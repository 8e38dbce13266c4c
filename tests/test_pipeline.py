"""A pipeline's folder is whole, harmless and the same in another process; its calls keep promises.

The long versions (steps, sizes) are in lesson 52.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderTiny, DiffusionPipeline
from project import ENVIRONMENT
from safetensors.torch import load_file, save_file

from cmmd.checkpoint import save_checkpoint
from cmmd.core import data_path, make_generator
from cmmd.guidance import DDIM
from cmmd.mel import griffin_lim, log_mel
from cmmd.melgan import MelGANGenerator, VocoderError
from cmmd.pipeline import (
    CARD_SECTIONS,
    COMPONENTS,
    CMMDPipeline,
    ModelError,
    find_model,
    find_pipeline,
    load_model,
    model_card,
    new_model,
    sample_file,
    shipped_models,
    soundtrack,
)
from cmmd.solvers import DPMSolver
from cmmd.toy import make_clips
from cmmd.unet import CMMDUNet, UNetConfig

WEIGHTS, FEW = "diffusion_pytorch_model.safetensors", dict(num_inference_steps=2)


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seed(*numbers):
    return [make_generator("pipeline", n) for n in numbers]


@pytest.fixture(scope="module")
def pipe():
    return quiet(CMMDPipeline.from_pretrained("toy-bounce"))


@pytest.fixture(scope="module")
def clips(pipe):
    return make_clips(2, spec=pipe.model.config.clip, seed=52)


@pytest.fixture(scope="module")
def saved(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline") / "saved"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    "A folder to damage."
    return shutil.copytree(saved, tmp_path / "copy")


def one_line(kind, call, *args, **given):
    "The message of the error that a call must end with."
    with pytest.raises(kind) as caught:
        call(*args, **given)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500, message
    return message


# ---- the format
def test_the_shipped_models_have_the_format(pipe):
    assert {"toy-bounce", "toy-cmmd", "toy-ncmmd"} <= set(shipped_models())
    for name in shipped_models():
        folder = data_path("weights", name)
        inside = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        assert inside == {
            "README.md",
            "log.jsonl",
            "model_index.json",
            "model/config.json",
            f"model/{WEIGHTS}",
        }
        index = json.loads((folder / "model_index.json").read_text())
        assert index["_class_name"] == "CMMDPipeline" and index["model"] == [
            "cmmd.unet",
            "CMMDUNet",
        ]
        assert find_model(name) == find_model(folder) == find_model(folder / "model")


def test_a_saved_folder_is_whole(saved):
    index = json.loads((saved / "model_index.json").read_text())
    kinds = {name: value for name, value in index.items() if not name.startswith("_")}
    assert kinds == {
        "model": ["cmmd.unet", "CMMDUNet"],
        "vae": ["diffusers", "AutoencoderKL"],
        "vocoder": ["cmmd.melgan", "MelGANGenerator"],
    }
    for name in kinds:
        assert {p.name for p in (saved / name).iterdir()} == {"config.json", WEIGHTS}
        assert "_name_or_path" not in (saved / name / "config.json").read_text()
    assert (saved / "README.md").read_text().startswith("---\n")
    text = "".join(p.read_text() for p in saved.rglob("*.json"))
    assert "__main__" not in text and str(data_path()) not in text


def test_saving_and_loading_changes_no_bit(pipe, saved):
    again = CMMDPipeline.from_pretrained(saved)
    for name, part in pipe.components.items():
        other = getattr(again, name)
        assert type(other) is type(part) and not any(p.requires_grad for p in other.parameters())
        ours, theirs = part.state_dict(), other.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert again.vae.config.scaling_factor == pipe.vae.config.scaling_factor


FRESH = """
import sys, torch
from cmmd.pipeline import CMMDPipeline
from cmmd.core import make_generator
pipe = CMMDPipeline.from_pretrained(sys.argv[1], local_files_only=True)
pipe.set_progress_bar_config(disable=True)
from safetensors.torch import load_file, save_file
video = load_file(sys.argv[2])["video"]
made = pipe(video=video, num_inference_steps=2, generator=make_generator("pipeline", 0))
save_file({"mel": made.mel.contiguous(), "audio": made.audio.contiguous()}, sys.argv[3])
"""


def test_the_same_bits_in_a_fresh_process(pipe, clips, saved, tmp_path):
    save_file({"video": clips.video[:1].contiguous()}, tmp_path / "in.safetensors")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        here = pipe(video=clips.video[:1], **FEW, generator=seed(0)[0])
    finally:
        torch.set_num_threads(before)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            FRESH,
            str(saved),
            str(tmp_path / "in.safetensors"),
            str(tmp_path / "out.safetensors"),
        ],
        cwd=tmp_path,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    there = load_file(tmp_path / "out.safetensors")
    assert torch.equal(here.mel, there["mel"]) and torch.equal(here.audio, there["audio"])


def test_diffusers_own_loader_reads_the_folder_too(pipe, clips, saved):
    theirs = quiet(DiffusionPipeline.from_pretrained.__func__(CMMDPipeline, saved))
    ours, other = (
        p(audio=clips.waveform[:1], **FEW, guidance_weight=0.0, generator=seed(0)[0])
        for p in (pipe, theirs)
    )
    assert (ours.video.int() - other.video.int()).abs().max() <= 1


@pytest.mark.parametrize("kind", ["plain", "run", "pipeline"])
def test_other_folders(kind, pipe, tmp_path):
    "A plain model's folder, a training run's, and an index of the model alone."
    place = tmp_path / "there" if kind == "plain" else tmp_path / "there" / "model"
    shutil.copytree(find_model("toy-cmmd"), place)
    if kind == "pipeline":
        shutil.copy(data_path("weights", "toy-cmmd", "model_index.json"), tmp_path / "there")
    found = CMMDPipeline.from_pretrained(tmp_path / "there")
    wanted = load_model("toy-cmmd").state_dict()
    assert all(torch.equal(x, wanted[name]) for name, x in found.model.state_dict().items())
    assert load_model(tmp_path / "there").config == found.model.config
    given = CMMDPipeline.from_pretrained(tmp_path / "there", model=pipe.model, vae=pipe.vae)
    assert given.model is pipe.model and given.vae is pipe.vae


def test_another_kind_of_vae_and_a_trained_vocoder_travel(pipe, tmp_path):
    taesd = AutoencoderTiny().eval().requires_grad_(False)
    made = CMMDPipeline(new_model(UNetConfig.tiny(vae="tiny")), vae=taesd)
    made.vocoder.first.bias.data += 0.25
    made.save_pretrained(tmp_path / "tiny")
    again = CMMDPipeline.from_pretrained(tmp_path / "tiny")
    assert isinstance(again.vae, AutoencoderTiny)
    assert torch.equal(again.vocoder.first.bias, made.vocoder.first.bias)
    made.vocoder = None  # Griffin-Lim, on purpose
    made.save_pretrained(tmp_path / "tiny")
    again = CMMDPipeline.from_pretrained(tmp_path / "tiny")
    assert again.vocoder is None and again.speaker() is griffin_lim


def test_sample_file_uses_the_folders_own_parts(pipe, copy, tmp_path):
    state = load_file(copy / "vocoder" / WEIGHTS)
    last = next(name for name in state if name.startswith("last") and name.endswith("original0"))
    state[last] = state[last] * 0
    save_file(state, copy / "vocoder" / WEIGHTS)
    told = {}
    for name, model in (("own", copy), ("shipped", pipe)):
        made = sample_file(tmp_path / f"{name}.mp4", model=model, seconds=0.4, num_sample_steps=1)
        told[name] = made.sampling.vocoder.model.last.weight
    assert not torch.equal(told["own"], told["shipped"]) and not told["own"].any()


def test_an_interrupted_save_leaves_nothing_behind(pipe, saved, tmp_path, monkeypatch):
    before = (saved / "model_index.json").read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(MelGANGenerator, "save_pretrained", full)
    for target in (tmp_path / "new", saved):
        with pytest.raises(OSError, match="No space"):
            pipe.save_pretrained(target)
    assert not list(tmp_path.iterdir()) and (saved / "model_index.json").read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == ["saved"]


# ---- hostile and damaged folders
PLANT = "open({!r}, 'w').write('ran')\n"


def _index(folder, **changes):
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _nan(folder, part):
    state = load_file(folder / part / WEIGHTS)
    next(iter(state.values())).view(-1)[0] = float("nan")
    save_file(state, folder / part / WEIGHTS)


def _sizes(folder, part, **changes):
    path = folder / part / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


DAMAGES = {
    "no index and no model": lambda f: (
        (f / "model_index.json").unlink(),
        shutil.rmtree(f / "model"),
    ),
    "index is no JSON": lambda f: (f / "model_index.json").write_text("{"),
    "index is a list": lambda f: (f / "model_index.json").write_text("[1]"),
    "index is deep": lambda f: (f / "model_index.json").write_text("[" * 100_000),
    "index is huge": lambda f: (f / "model_index.json").write_text(" " * 2_000_000 + "{}"),
    "another pipeline": lambda f: _index(f, _class_name="StableDiffusionPipeline"),
    "a pipeline of its own": lambda f: _index(f, _class_name=["pipeline", "Planted"]),
    "model of a foreign module": lambda f: _index(f, model=["planted_module", "Planted"]),
    "vae of a foreign module": lambda f: _index(f, vae=["planted_module", "Planted"]),
    "vae of diffusers, but no vae": lambda f: _index(f, vae=["diffusers", "UNet2DModel"]),
    "vocoder is a call": lambda f: _index(f, vocoder=["os", "system"]),
    "model is a word": lambda f: _index(f, model="cmmd.unet"),
    "model is null": lambda f: _index(f, model=[None, None]),
    "a fourth component": lambda f: _index(f, safety_checker=["planted_module", "Planted"]),
    "no vae folder": lambda f: shutil.rmtree(f / "vae"),
    "no vocoder folder": lambda f: shutil.rmtree(f / "vocoder"),
    "vae's config of another class": lambda f: _sizes(f, "vae", _class_name="AutoencoderTiny"),
    "vae does not fit its weights": lambda f: _sizes(f, "vae", block_out_channels=[16, 32, 64]),
    "vae of endless depth": lambda f: _sizes(f, "vae", layers_per_block=10**9),
    "vae scales by nothing": lambda f: _sizes(f, "vae", scaling_factor=0.0),
    "vae scales by NaN": lambda f: _sizes(f, "vae", scaling_factor=float("nan")),
    "model of endless depth": lambda f: _sizes(f, "model", n_blocks=10**9),
    "vocoder of another rate": lambda f: _sizes(f, "vocoder", sample_rate=22_050),
    **{f"NaN in {part}": lambda f, p=part: _nan(f, p) for part in COMPONENTS},
    **{
        f"{part} cut off": lambda f, p=part: os.truncate(f / p / WEIGHTS, 10_000)
        for part in COMPONENTS
    },
    **{
        f"{part} is a pickle": lambda f, p=part: (f / p / WEIGHTS).rename(
            f / p / "diffusion_pytorch_model.bin"
        )
        for part in COMPONENTS
    },
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_folder_is_one_line_and_runs_nothing(damage, copy, tmp_path, monkeypatch):
    mark = tmp_path / "ran"
    for name in ("pipeline", "planted_module", "Planted", "__init__"):
        for place in (copy, copy / "model", copy / "vae"):
            (place / f"{name}.py").write_text(PLANT.format(str(mark)))
    monkeypatch.chdir(copy)
    monkeypatch.syspath_prepend(str(copy))
    DAMAGES[damage](copy)
    message = one_line(ModelError, CMMDPipeline.from_pretrained, copy)
    assert str(copy) in message and not mark.exists()


def test_planted_code_beside_a_good_folder_is_not_run(copy, tmp_path, monkeypatch):
    mark = tmp_path / "ran"
    for name in ("pipeline", "my_pipeline", "cmmd", "diffusers"):
        (copy / f"{name}.py").write_text(PLANT.format(str(mark)))
    _index(copy, _module="pipeline")
    CMMDPipeline.from_pretrained(copy)
    for option in ({"custom_pipeline": "my_pipeline"}, {"trust_remote_code": True}):
        one_line(TypeError, CMMDPipeline.from_pretrained, copy, **option)
    one_line(TypeError, CMMDPipeline.from_pretrained, copy, use_safetensors=False)
    assert not mark.exists()


def test_no_network_is_three_lines_within_five_seconds(monkeypatch):
    "Without a network; and with one that swallows every packet."

    class Deaf:
        def __init__(self, **_):
            pass

        def model_info(self, *_, **__):
            time.sleep(30)

    for hub in (None, Deaf):
        if hub:
            monkeypatch.setattr("cmmd.pipeline.HfApi", hub)
        began = time.perf_counter()
        with pytest.raises(ModelError) as caught:
            find_pipeline("nobody-at-all/no-such-model")
        assert time.perf_counter() - began < 5.5
        lines = str(caught.value).splitlines()
        assert len(lines) <= 3 and "nobody-at-all/no-such-model" in lines[0]
        assert "--local-dir" in lines[2] and "toy-bounce" in lines[1]


def test_the_hub_gives_only_what_is_read(saved, tmp_path, monkeypatch):
    "A stand-in for the hub: the commit is pinned, and no other kind of file is asked for."
    asked = {}

    class Hub:
        def __init__(self, **_):
            pass

        def model_info(self, name, **given):
            return type("Info", (), {"sha": "0" * 40})

    def snapshot(name, **given):
        asked.update(given)
        return str(saved)

    monkeypatch.setattr("cmmd.pipeline.HfApi", Hub)
    monkeypatch.setattr("cmmd.pipeline.snapshot_download", snapshot)
    assert CMMDPipeline.from_pretrained("somebody/balls").vae is not None
    assert asked["revision"] == "0" * 40
    assert {p.rpartition(".")[2] for p in asked["allow_patterns"]} == {"json", "safetensors", "md"}


# ---- calls
def test_a_clip_of_a_batch_is_what_it_is_alone(pipe, clips):
    calls = (
        dict(video=clips.video[:, :6], guidance_weight=2.0),
        dict(audio=clips.waveform[:, :9600], guidance_weight=0.2),
        dict(shape=(2, 6)),
    )
    for given in calls:
        both = pipe(**given, num_inference_steps=4, generator=seed(0, 1))
        for i in (0, 1):
            own = {
                name: x[i : i + 1] if isinstance(x, torch.Tensor) else x
                for name, x in given.items()
            }
            own = own | ({"shape": (1, 6)} if "shape" in given else {})
            one = pipe(**own, num_inference_steps=4, generator=seed(i))
            torch.testing.assert_close(both.mel[i], one.mel[0], atol=1e-5, rtol=0)
            torch.testing.assert_close(both.audio[i], one.audio[0], atol=1e-5, rtol=0)
            flips = (both.video[i].int() - one.video[0].int()).abs()
            assert flips.max() <= 1 and flips.float().mean() < 1e-3  # of a rounding to 8 bits


def test_it_is_the_same_code_as_the_functions(pipe, clips):
    wave = soundtrack(pipe.model, pipe.vae, clips.video[0], num_sample_steps=2)
    made = pipe(video=clips.video[:1], **FEW, generator=make_generator(0, "soundtrack", 0))
    assert torch.equal(made.audio[0], wave)


@pytest.mark.parametrize("n", [1, 18, 60])
def test_any_length_in_every_direction(n, pipe):
    "One frame, the model's own length, more than one window."
    long = make_clips(1, spec=pipe.model.config.clip.with_frames(max(n, 2)), seed=1)
    fast = dict(num_inference_steps=1, guidance_weight=0.0)
    for made in (
        pipe(video=long.video[:, :n], **fast),
        pipe(audio=long.waveform[:, : 1600 * n], **fast),
        pipe(shape=(1, n), **fast),
    ):
        assert made.video.shape == (1, n, 64, 64, 3) and made.video.dtype == torch.uint8
        assert made.audio.shape == (1, 1600 * n) and made.mel.shape == (1, 80, 1600 * n // 256)
        assert made.audio.abs().max() <= 1 and torch.isfinite(made.mel).all()


def test_what_is_given_is_passed_on_and_never_changed(pipe, clips):
    video, wave = clips.video.clone(), clips.waveform.clone()
    sound, film = pipe(video=video, **FEW), pipe(audio=wave, **FEW)
    assert torch.equal(sound.video, clips.video) and torch.equal(video, clips.video)
    assert torch.equal(film.audio, clips.waveform) and torch.equal(wave, clips.waveform)
    torch.testing.assert_close(film.mel, log_mel(wave, pipe.model.config.clip))


class Stop(Exception):
    pass


def test_the_callback_sees_every_step_and_may_stop(pipe, clips):
    seen, marks = [], []

    def watch(p, i, t, guess):
        assert p is pipe and guess["video"].shape[1] == 18 and guess["audio"].shape[1] == 80
        seen.append((i, t))
        if len(seen) == 3:
            raise Stop

    solver = DDIM(on_step=lambda i, n, *_: marks.append((i, n)))
    with pytest.raises(Stop):
        pipe(
            video=clips.video[:1],
            num_inference_steps=9,
            solver=solver,
            callback_on_step_end=watch,
            generator=seed(0)[0],
        )
    assert [i for i, _ in seen] == [0, 1, 2] and seen[0][1] > seen[2][1] and len(marks) == 3
    after = pipe(video=clips.video[:1], **FEW, generator=seed(0)[0])
    assert torch.equal(after.mel, pipe(video=clips.video[:1], **FEW, generator=seed(0)[0]).mel)


def test_another_solver(pipe, clips):
    made = pipe(video=clips.video[:1], **FEW, solver=DPMSolver(), generator=seed(0)[0])
    assert torch.isfinite(made.mel).all()


def test_the_bar_can_be_shown_and_hidden(pipe, capsys):
    shown = CMMDPipeline(pipe.model, pipe.vae, pipe.vocoder)
    shown(shape=(1, 4), **FEW)
    assert "2/2" in capsys.readouterr().err
    quiet(shown)(shape=(1, 4), **FEW)
    assert capsys.readouterr().err == ""


def test_dtype_moves_network_and_vae_but_not_the_vocoder(pipe, saved, clips):
    low = quiet(CMMDPipeline.from_pretrained(saved, torch_dtype=torch.bfloat16))
    assert low.model.dtype == low.vae.dtype == torch.bfloat16
    assert low.vocoder.dtype == torch.float32 and low.dtype == torch.bfloat16
    ours = pipe.vocoder.state_dict()
    assert all(torch.equal(x, ours[name]) for name, x in low.vocoder.state_dict().items())
    short = dict(video=clips.video[:1, :6]), dict(audio=clips.waveform[:1, :9600])
    for given, weight in zip(short, (2.0, 0.0)):
        fast = dict(num_inference_steps=1 if weight else 2, guidance_weight=weight)
        a, b = (p(**given, **fast, generator=seed(0)[0]) for p in (pipe, low))
        assert a.mel.dtype == b.mel.dtype == b.audio.dtype == torch.float32
        assert (a.mel - b.mel).abs().mean() < 0.02
        assert (a.video.float() - b.video.float()).abs().mean() < 2
    moved = low.to("cpu", torch.float32)
    assert moved is low and low.model.dtype == torch.float32


def test_inside_inference_mode_and_with_a_model_in_training(pipe, clips):
    "Guidance needs gradients of its own, whatever the caller has switched off or on."
    wanted = pipe(video=clips.video[:1], **FEW, generator=seed(0)[0])
    with torch.inference_mode():
        made = pipe(video=clips.video[:1] + 0, **FEW, generator=seed(0)[0])
    assert torch.equal(made.mel, wanted.mel)
    trained = CMMDPipeline(load_model("toy-bounce").requires_grad_(True), pipe.vae, pipe.vocoder)
    made = quiet(trained)(video=clips.video[:1], **FEW, generator=seed(0)[0])
    assert all(p.grad is None for p in trained.model.parameters())
    torch.testing.assert_close(made.mel, wanted.mel, atol=1e-4, rtol=1e-4)


ONE = torch.zeros(1, 28_800)
WRONG = {
    "both": (dict(video=torch.zeros(1, 18, 64, 64, 3, dtype=torch.uint8), audio=ONE), "not both"),
    "no batch": (dict(video=torch.zeros(18, 64, 64, 3, dtype=torch.uint8)), "video"),
    "size": (dict(video=torch.zeros(1, 18, 32, 64, 3, dtype=torch.uint8)), "video"),
    "channels first": (dict(video=torch.zeros(1, 18, 3, 64, 64, dtype=torch.uint8)), "video"),
    "floats": (dict(video=torch.zeros(1, 18, 64, 64, 3)), "video"),
    "no frames": (dict(video=torch.zeros(1, 0, 64, 64, 3, dtype=torch.uint8)), "video"),
    "a path": (dict(video="film.mp4"), "video"),
    "one sound": (dict(audio=ONE[0]), "audio"),
    "stereo": (dict(audio=ONE[:, None]), "audio"),
    "integers": (dict(audio=ONE.to(torch.int16)), "audio"),
    "not in -1 to 1": (dict(audio=ONE + 32_767.0), "audio"),
    "NaN": (dict(audio=ONE * float("nan")), "audio"),
    "an array": (dict(audio=ONE.numpy()), "audio"),
    "no steps": (dict(num_inference_steps=0), "num_inference_steps"),
    "half steps": (dict(num_inference_steps=1.5), "num_inference_steps"),
    "true steps": (dict(num_inference_steps=True), "num_inference_steps"),
    "negative weight": (dict(audio=ONE, guidance_weight=-1), "guidance_weight"),
    "weight NaN": (dict(audio=ONE, guidance_weight=float("nan")), "guidance_weight"),
    "weight without condition": (dict(guidance_weight=1.0), "guidance_weight"),
    "generators": (dict(audio=ONE, generator=[None, None]), "generator"),
    "a seed": (dict(audio=ONE, generator=3), "generator"),
    "shape": (dict(shape=(0, 18)), "clips"),
    "frames": (dict(shape=(1, 10**9)), "frames"),
    "shape 3": (dict(shape=(1, 2, 3)), "shape"),
    "solver": (dict(solver="ddim"), "solver"),
    "callback": (dict(callback_on_step_end=3), "callback_on_step_end"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_input_is_one_line_before_any_work(wrong, pipe, monkeypatch):
    monkeypatch.setattr(CMMDUNet, "forward", lambda *_: pytest.fail("work was done"))
    given, word = WRONG[wrong]
    assert word in one_line((ValueError, TypeError), pipe, **given)


def test_parts_that_do_not_belong_together(pipe):
    class Mine(CMMDUNet):
        pass

    small = UNetConfig.tiny(vae="tiny")
    assert "Mine" in one_line(TypeError, CMMDPipeline, Mine(small))
    one_line(TypeError, CMMDPipeline, pipe.vae)
    assert "vae" in one_line(TypeError, CMMDPipeline, pipe.model, vae=pipe.model)
    wide = AutoencoderTiny(latent_channels=8)
    assert "8" in one_line(ValueError, CMMDPipeline, pipe.model, vae=wide)
    other = MelGANGenerator(n_mels=64, ratios=(8, 8, 4), ngf=4)
    assert "64" in one_line(VocoderError, CMMDPipeline, pipe.model, vocoder=other)
    unknown = new_model(UNetConfig.tiny(vae="no-such-vae"))
    assert "no-such-vae" in one_line(ModelError, CMMDPipeline, unknown)


def test_where_the_shipped_vocoder_does_not_fit_griffin_lim_is_named(pipe):
    clip = replace(pipe.model.config.clip, f_max=7_600.0)
    made = quiet(CMMDPipeline(new_model(UNetConfig.tiny(clip=clip)), vae=pipe.vae))
    assert made.vocoder is None
    with pytest.warns(UserWarning, match="f_max 8000, got 7600: Griffin-Lim"):
        assert made(shape=(1, 4), **FEW).audio.shape == (1, 6400)


# ---- cards and the hub
def test_the_card(pipe, tmp_path):
    card = model_card(pipe, title="Balls", data="4,096 clips.", figures="F1 0.96", licence="mit")
    head, _, body = card[4:].partition("\n---\n")
    lines = dict(line.split(": ", 1) for line in head.splitlines() if ": " in line)
    assert lines == {"license": "mit", "library_name": "cmmd"} and "- video-to-audio" in head
    for word in ("4,096 clips.", "F1 0.96", "deepfakes", "C2PA", "generated", "consent", "# Balls"):
        assert word in body
    assert "Not stated" not in card and model_card(pipe).count("Not stated") == 2
    pipe.save_pretrained(tmp_path / "carded", card=card)
    assert (tmp_path / "carded" / "README.md").read_text() == card
    again = CMMDPipeline.from_pretrained(tmp_path / "carded")
    assert again.card() == card  # it belongs to these weights ...
    again.model = load_model("toy-cmmd")
    assert "Not stated" in again.card()  # ... and to no others


@pytest.mark.parametrize("name", shipped_models())
def test_the_cards_of_the_shipped_models(name):
    card = data_path("weights", name, "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n")
    headings = re.findall(r"^## (.*)$", card, re.M)
    assert [h for h in headings if h in CARD_SECTIONS] == list(CARD_SECTIONS), headings
    assert "Not stated" not in card and "deepfakes" in card


def test_pushing_uploads_what_saving_writes(pipe, monkeypatch):
    calls = []

    class Hub:
        def __init__(self, token=None):
            calls.append(("token", token))

        def create_repo(self, repo_id, **given):
            calls.append((repo_id, given))

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            files = {
                os.path.relpath(os.path.join(root, f), folder_path)
                for root, _, names in os.walk(folder_path)
                for f in names
            }
            with open(os.path.join(folder_path, "README.md")) as f:
                calls.append((files, f.read()))
            return type("Commit", (), {"commit_url": "https://example.org/commit"})

    monkeypatch.setattr("cmmd.pipeline.HfApi", Hub)
    assert pipe.push_to_hub("somebody/balls", token="secret") == "https://example.org/commit"
    assert calls[:2] == [
        ("token", "secret"),
        ("somebody/balls", {"private": True, "exist_ok": True}),
    ]
    files, card = calls[2]
    parts = {f"{part}/{file}" for part in COMPONENTS for file in ("config.json", WEIGHTS)}
    assert files == parts | {"README.md", "model_index.json"}
    assert card == data_path("weights", "toy-bounce", "README.md").read_text()


# ---- checkpoints, and where memory ends
def checkpoint_of(network, folder, **config):
    "A checkpoint as the trainer writes it, as far as a model needs it."
    about = {"model": {"class": "CMMDUNet", **network.config.to_dict()}}
    tensors = {"ema": dict(network.named_parameters())}
    return save_checkpoint(folder, 16, tensors=tensors, state={}, config=about | config)


def test_a_checkpoint_is_loaded_with_all_its_checks(tmp_path):
    model = new_model(UNetConfig.tiny(vae="tiny"), seed=5)
    step = checkpoint_of(model, tmp_path / "run")
    loaded = load_model(step)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    state = model.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in loaded.state_dict().items())
    assert CMMDPipeline.from_pretrained(step).model.config.vae == "tiny"
    with pytest.raises(ModelError, match=f"not finished; take .*{step.name}"):
        load_model(tmp_path / "run")
    for k, (config, words) in enumerate(
        (
            ({"model": {"class": "MelGANGenerator"}}, "of no CMMD model"),
            ({"model": "CMMDUNet"}, "of no CMMD model"),
            ({"model": {"class": "CMMDUNet", "n_blocks": 10**9}}, "do not fit: more than 64"),
            ({"model": {"class": "CMMDUNet", "n_bricks": 1}}, "do not fit"),
        )
    ):
        with pytest.raises(ModelError, match=words) as error:
            load_model(checkpoint_of(model, tmp_path / str(k), **config))
        assert "\n" not in str(error.value)
    (step / "ema.safetensors").write_bytes(b"short")
    with pytest.raises(ModelError, match="ema.safetensors"):
        load_model(step)


def test_memory_that_ends_is_told_with_what_was_asked_for(pipe, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.00 GiB.\nMore.")

    monkeypatch.setattr("cmmd.pipeline.generate_long", full)
    films = make_clips(2, seed=4)
    for given, asked in (
        ({"video": films.video[:, :7]}, "2 x 7 frames"),
        ({"audio": films.waveform[:, :11_000]}, "2 x 7 frames"),
        ({"shape": (3, 9)}, "3 x 9 frames"),
    ):
        with pytest.raises(MemoryError, match=asked) as error:
            pipe(**given, **FEW)
        knobs = ("fewer or shorter clips", "guidance_weight=0", "smaller model", "7.00 GiB")
        assert all(word in str(error.value) for word in knobs) and "\n" not in str(error.value)
