"""Recipes: pinned to the paper and the classes, strangers' files refused, changes never guessed."""

import os
import tomllib
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cmmd.contrastive import ContrastiveConfig
from cmmd.core import data_path
from cmmd.recipes import (
    LEFT_OUT,
    Recipe,
    find_key,
    load_recipe,
    read_change,
    recipe_keys,
    recipe_names,
)
from cmmd.train import TrainConfig
from cmmd.unet import CMMDUNet, UNetConfig


def file_of(folder, text) -> str:
    path = folder / "mine.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refused(*arguments, **settings) -> str:
    "The one line with which a recipe is refused."
    with pytest.raises((ValueError, TypeError)) as caught:
        load_recipe(*arguments, **settings)
    text = str(caught.value)
    assert len(text.splitlines()) == 1 and len(text) < 500
    return text


# ---- the shipped ones
def test_recipes_are_the_classes():
    "A file and the class method of its name can never say different things."
    tiny, small, paper, cmmd = map(load_recipe, recipe_names())
    assert tiny.model == UNetConfig.tiny(vae="tiny") and tiny.train == TrainConfig.tiny()
    assert small.model == UNetConfig.small()
    assert small.train == TrainConfig.tiny(steps=20_000, learning_rate=5e-4)
    assert paper.model == UNetConfig.paper() and paper.train == TrainConfig.paper()
    assert cmmd.model == UNetConfig.paper() and cmmd.train == TrainConfig.paper_contrastive()
    assert (tiny.contrastive, small.contrastive, paper.contrastive) == (None, None, None)
    assert cmmd.contrastive == ContrastiveConfig(weight=5e-5)


def test_the_papers_numbers():
    "Table 4 and appendix B.2, written once more."
    stated = {
        "model.video_channels": [128, 256, 384, 512],
        "model.head_dim": 64,
        "model.num_train_steps": 1000,
        "model.clip.fps": 10,
        "model.clip.n_frames": 18,
        "model.clip.frame_size": 128,
        "model.clip.sample_rate": 16_000,
        "model.clip.win_length": 512,
        "model.clip.hop_length": 256,
        "model.clip.n_mels": 80,
        "train.steps": 700_000,
        "train.learning_rate": 1e-4,
        "train.schedule": "paper",
    }
    own = {
        "paper": {"train.batch_size": 8, "train.start_step": 0},
        "paper-cmmd": {
            "train.batch_size": 2,
            "train.start_step": 400_000,
            "contrastive.weight": 5e-5,
            "contrastive.shift_frames": [2, 4],
        },
    }
    for name, more in own.items():
        text = data_path("configs", f"{name}.toml").read_text()
        file = tomllib.loads(text)
        for key, value in (stated | more).items():
            part = file
            for word in key.split("."):
                part = part[word]
            assert part == value, (name, key)
    text = data_path("configs", "paper-cmmd.toml").read_text()
    assert "reduced; why is not said" in text, "no reason that the paper does not give"
    rate = load_recipe("paper-cmmd").train.rate
    assert rate(400_000) == pytest.approx(3.2768e-5) and rate(699_999) == 2e-5


@pytest.mark.parametrize("name", ["paper", "paper-cmmd"])
def test_the_papers_recipes_name_every_key_with_its_source(name):
    text = data_path("configs", f"{name}.toml").read_text()
    silent = [
        x for x in text.splitlines() if "=" in x and not x.startswith("#") and "  # " not in x
    ]
    assert silent == []
    file = tomllib.loads(text)
    clip = file["model"].pop("clip")
    named = {f"{s}.{k}" for s, part in file.items() for k in part}
    named |= {f"model.clip.{k}" for k in clip}
    optional = {"contrastive.bound"}
    if name == "paper":
        optional |= {k for k in recipe_keys() if k.startswith("contrastive.")}
    assert set(recipe_keys()) - named == optional


def test_every_field_is_a_key_or_left_out_with_a_reason():
    for section, kind in (
        ("model", UNetConfig),
        ("train", TrainConfig),
        ("contrastive", ContrastiveConfig),
    ):
        for f in fields(kind):
            assert (f"{section}.{f.name}" in recipe_keys()) != (f"{section}.{f.name}" in LEFT_OUT)


@pytest.mark.parametrize("name", recipe_names())
def test_written_and_read_again(name, tmp_path):
    one = load_recipe(name)
    again = load_recipe(file_of(tmp_path, one.to_toml()))
    assert again == replace(one, name="mine") and again.hash == one.hash
    assert one.hash in one.to_toml().splitlines()[0]


def test_the_hash_is_of_the_values():
    one = load_recipe("tiny")
    assert load_recipe("tiny", changes=["train.steps = 2000"]).hash == one.hash
    hashes = {
        load_recipe("tiny", changes=[c]).hash
        for c in ("steps=2001", "vae=taesd", "weight=0.1", "compile=true", "fps=20", "bound=none")
        if c != "bound=none"
    }
    assert len(hashes | {one.hash}) == 6


def test_reading_one_draws_nothing():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    load_recipe("small")
    assert torch.equal(before, torch.get_rng_state())


# ---- changes
def test_changes_are_applied_in_their_types():
    made = load_recipe(
        "paper",
        changes=[
            "learning_rate=1",
            "train.schedule=constant",
            "attention_levels=[3]",
            "weight = 5e-5",
            "bound=none",
            "fusion='easy'",
            "stratified_t=false",
        ],
    )
    assert made.train.learning_rate == 1.0 and isinstance(made.train.learning_rate, float)
    assert made.train.schedule == "constant" and made.train.stratified_t is False
    assert made.model.attention_levels == (3,) and made.contrastive == ContrastiveConfig(5e-5)


@pytest.mark.parametrize(
    "change, words",
    [
        ("stesp=7", ("stesp", "train.steps")),
        ("learning_rat=1", ("learning_rat", "train.learning_rate")),
        ("model.steps=7", ("model.steps", "train.steps")),
        ("n_mel=1", ("n_mel", "n_mels")),
        ("n_mels=80", ("model.n_mels", "model.clip.n_mels")),
        ("mel_mean=0", ("mel_mean", "data")),
        ("model.clip=1", ("model.clip", "section")),
        ("progress=true", ("progress",)),
        ("steps", ("KEY=VALUE",)),
        ("=7", ("unknown key",)),
        ("", ("KEY=VALUE",)),
        ("steps=", ("train.steps", "whole number")),
        ("steps=1.5", ("train.steps", "whole number", "1.5")),
        ("steps=true", ("train.steps", "whole number")),
        ("steps=0", ("steps", "0")),
        ("steps=-1", ("steps", "-1")),
        ("steps=1e3", ("train.steps", "whole number")),
        ("steps=99999999999999999999999", ("train.steps",)),
        ("learning_rate=nan", ("learning_rate", "nan")),
        ("learning_rate=inf", ("learning_rate",)),
        ("learning_rate='1'", ("train.learning_rate", "number")),
        ("schedule=linear", ("schedule", "cosine")),
        ("mixed_precision=fp8", ("mixed_precision", "bf16")),
        ("stratified_t=1", ("train.stratified_t", "true or false")),
        ("video_channels=64", ("model.video_channels", "list")),
        ("video_channels=[]", ("video_channels",)),
        ("video_channels=[1e9, 2]", ("model.video_channels",)),
        ("video_channels=[100000, 100000]", ("video_channels", "65,536")),
        ("head_dim=48", ("head_dim", "48")),
        ("n_blocks=1000000000", ("n_blocks", "64")),
        ("attention_levels=[7]", ("attention_levels", "7")),
        ("frame_size=100", ("frame_size", "8")),
        ("model.n_mels=64", ("n_mels", "64", "80")),
        ("weight=-1", ("weight", "-1")),
        ("negatives=swap", ("contrastive.negatives", "weight")),
        ("shift_frames=[2]", ("shift_frames", "2")),
        ("vae=a\x1b[2Jb", ("model.vae", "printable")),
        ("steps=7\nseed=8", ("train.steps",)),
        ("steps=" + "[" * 3000, ("train.steps",)),
        ("fusion=glue", ("fusion", "glue", "easy")),
    ],
    ids=lambda x: repr(x)[:30],
)
def test_bad_changes_name_the_key(change, words):
    text = refused("tiny", changes=[change])
    assert [w for w in words if w not in text] == []
    assert text.isprintable()


def test_a_key_may_be_changed_once():
    assert "train.steps is given twice" in refused("tiny", changes=["steps=7", "train.steps=7"])


def test_a_run_that_starts_behind_its_last_step_says_what_to_set():
    for change in ("steps=500", "train.steps = 500"):
        line = refused("paper-cmmd", changes=[change])
        assert "train.steps=400500" in line and "train.start_step=0" in line
    assert "400001" in refused("paper-cmmd", changes=["steps=1"])
    assert "start_step=0" in refused("tiny", changes=["start_step=2000"])
    for steps, start in ((400_500, 400_000), (500, 0)):
        made = load_recipe("paper-cmmd", changes=[f"steps={steps}", f"start_step={start}"])
        assert (made.train.steps, made.train.start_step) == (steps, start)
    other = refused("paper-cmmd", changes=["steps=0"])
    assert "steps must be from 1" in other and "start_step" not in other


def test_changes_are_a_list_of_texts():
    with pytest.raises(TypeError, match="list"):
        load_recipe("tiny", changes="steps=7")
    with pytest.raises(TypeError, match="text"):
        load_recipe("tiny", changes=[7])


KEYS = st.sampled_from([*recipe_keys(), *(k.rpartition(".")[2] for k in recipe_keys()), "", "x"])
VALUES = st.one_of(
    st.integers().map(str),
    st.floats().map(repr),
    st.text(max_size=30),
    st.lists(st.integers(-9, 10**6), max_size=4).map(str),
    st.sampled_from(["true", "none", "[[", '"', "'''", "1979-05-27", "{a=1}", "0x10", "1_0"]),
)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.tuples(KEYS, VALUES).map("=".join), st.text(max_size=40)))
@example("steps=0x10")
@example("weight=1e400")
@example("audio_snr_scale=1e-320")
@example("vae=\ud800")
@example("model.clip.sample_rate=1")
@example("model.video_channels=[8, 8]")
@example("model.video_channels=[-1, 2]")
@example("model.time_embed_dim=-1")
def test_any_change_is_taken_or_named(change):
    "Whatever stands behind --set: a recipe that can be built and written, or one line."
    try:
        made = load_recipe("tiny", changes=[change])
    except (ValueError, TypeError) as error:
        assert len(str(error).splitlines()) == 1 and str(error).startswith("recipe tiny: ")
        key = change.partition("=")[0].strip()
        if "=" in change and key in recipe_keys():
            assert key.rpartition(".")[2] in str(error)
        return
    assert isinstance(made, Recipe)
    assert tomllib.loads(made.to_toml())["train"]["steps"] == made.train.steps
    with torch.device("meta"):
        CMMDUNet(made.model)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(KEYS.filter(lambda k: k in recipe_keys()), VALUES, max_size=4))
def test_what_is_taken_is_written_and_read_the_same(tmp_path_factory, values):
    try:
        made = load_recipe("tiny", changes=[f"{k}={v}" for k, v in values.items()])
    except (ValueError, TypeError):
        return
    folder = tmp_path_factory.mktemp("recipes")
    again = load_recipe(file_of(folder, made.to_toml()))
    assert again == replace(made, name="mine") and again.hash == made.hash


# ---- names and files
def test_names():
    assert "paper-cmmd" in refused("papers") and "did you mean 'paper'" in refused("papers")
    assert ".toml" in refused("huge") and "huge" in refused("huge")
    assert refused("\x1b[31m").isprintable()
    assert "gone.toml" in refused("gone.toml")
    assert find_key(" steps ") == "train.steps" and read_change("seed=5") == ("train.seed", 5)


BAD_FILES = {
    "typo": ("[train]\nlearning_rat = 3e-4", ("learning_rat", "train.learning_rate")),
    "no section": ("steps = 200", ("steps", "[train]")),
    "wrong section": ("[model]\nsteps = 200", ("model.steps", "train.steps")),
    "unknown section": ("[trian]\nsteps = 8", ("trian", "[train]")),
    "text for a number": ("[train]\nsteps = '8'", ("train.steps", "whole number", "'8'")),
    "table for a value": ("[train.steps]\na = 1", ("train.steps",)),
    "clip is a number": ("[model]\nclip = 7", ("model.clip",)),
    "clip's key": ("[model.clip]\nfsp = 7", ("fsp", "model.clip.fps")),
    "data's own": ("[model]\nmel_std = 1.0", ("mel_std", "data")),
    "date": ("[train]\nseed = 1979-05-27", ("train.seed",)),
    "no TOML": ("[train\n", ("TOML", "line 1")),
    "twice": ("[train]\nsteps = 1\nsteps = 2", ("TOML",)),
    "too deep": ("x = " + "[" * 20_000, ("TOML",)),
    "no text": (b"\xff\xfe\x00", ("no text",)),
    "too large": ("#" * 70_000, ("70,000",)),
    "no network": ("[model]\nhead_dim = 48", ("head_dim", "48")),
    "no weight": ("[contrastive]\nnegatives = 'swap'", ("contrastive.negatives", "weight")),
    "endless levels": ("[model]\nn_blocks = 1000000", ("n_blocks", "64")),
}


@pytest.mark.parametrize("bad", BAD_FILES)
def test_bad_files_are_one_line(bad, tmp_path):
    text, words = BAD_FILES[bad]
    line = refused(file_of(tmp_path, text))
    assert [w for w in words if w not in line] == [] and line.isprintable()


def test_no_pipes_no_folders_no_devices(tmp_path):
    "A read that never ends is not begun."
    os.mkfifo(tmp_path / "pipe.toml")
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "zero.toml").symlink_to("/dev/zero")
    (tmp_path / "loop.toml").symlink_to(tmp_path / "loop.toml")
    for name in ("pipe", "folder", "zero", "loop"):
        assert f"{name}.toml" in refused(tmp_path / f"{name}.toml") or name == "zero"
    (tmp_path / "good.toml").write_text("")
    (tmp_path / "link.toml").symlink_to(tmp_path / "good.toml")
    assert load_recipe(tmp_path / "link.toml").train == TrainConfig.paper()


@settings(max_examples=100, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=200), st.text(max_size=200).map(lambda s: s.encode("utf-8", "replace"))
    )
)
def test_any_file_is_taken_or_named(tmp_path_factory, content):
    path = file_of(tmp_path_factory.mktemp("recipes"), content)
    try:
        load_recipe(path)
    except (ValueError, TypeError) as error:
        assert "mine" in str(error) and len(str(error).splitlines()) == 1
