"""What data/ ships: clips that the toy world makes again, weights as safetensors with a card."""

import json
import struct

import pytest
from project import ROOT

DATA = ROOT / "data"
CHECKPOINTS = sorted({p.parent for p in (DATA / "weights").rglob("*.safetensors")})


@pytest.fixture(scope="module")
def made():
    from make_data import files

    return files()


def test_toy_clips_are_what_the_toy_world_makes(made):
    assert {p.name for p in (DATA / "toy").iterdir()} == set(made), "run: python tests/make_data.py"
    assert (DATA / "toy" / "events.json").read_bytes() == made["events.json"], (
        "run: python tests/make_data.py"
    )


def test_toy_clips_show_and_sound_the_same(made, tmp_path):
    "Decoded, not byte by byte: another version of the encoder may write other bytes."
    import av
    import numpy as np

    for file in sorted(name for name in made if name.endswith(".mp4")):
        (tmp_path / file).write_bytes(made[file])
        for kind in ("video", "audio"):
            both = []
            for path in (DATA / "toy" / file, tmp_path / file):
                with av.open(str(path)) as box:
                    both.append([f.to_ndarray() for f in box.decode(**{kind: 0})])
            here, there = (
                np.concatenate([f.reshape(-1) for f in frames]).astype(float) for frames in both
            )
            assert here.shape == there.shape, file
            assert np.abs(here - there).mean() < (2 if kind == "video" else 0.02), (
                f"{file}: {kind} differs"
            )


def test_there_are_weights():
    assert CHECKPOINTS


@pytest.mark.parametrize("folder", CHECKPOINTS, ids=lambda p: p.relative_to(DATA).as_posix())
def test_checkpoint_has_a_card_and_nothing_but_plain_files(folder):
    kinds = {p.suffix for p in folder.iterdir() if p.is_file()}
    assert kinds <= {".safetensors", ".json", ".jsonl", ".md"}, "no other kind of file"
    above = folder.parent if (folder.parent / "model_index.json").is_file() else folder
    kinds = {p.suffix for p in above.iterdir() if p.is_file()}
    assert kinds <= {".json", ".jsonl", ".md", ".safetensors"}, "no other kind of file"
    cards = [p.read_text(encoding="utf-8") for p in above.glob("*.md")]
    assert cards, "a model card"
    for word in ("seed", "licen", "cmmd"):
        assert any(word in card.lower() for card in cards), f"the card lacks '{word}'"


@pytest.mark.parametrize(
    "path",
    [p for c in CHECKPOINTS for p in sorted(c.glob("*.safetensors"))],
    ids=lambda p: f"{p.parent.name}/{p.name}",
)
def test_weights_are_whole_and_finite(path):
    import torch
    from safetensors.torch import load_file

    data = path.read_bytes()
    head = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    ends = [t["data_offsets"][1] for name, t in head.items() if name != "__metadata__"]
    assert 8 + struct.unpack("<Q", data[:8])[0] + max(ends) == len(data)
    assert all(torch.isfinite(t.float()).all() for t in load_file(path).values())
    assert len(data) <= 12_000_000, "small enough for git"
