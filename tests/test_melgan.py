"The vocoder: sizes, lengths, names, streaming, and every kind of wrong mel and hostile weights."

import json
import pickle
import struct
import warnings
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cmmd.core import ClipSpec, make_generator
from cmmd.mel import log_mel
from cmmd.melgan import MelGANDiscriminator, MelGANGenerator, Vocoder, VocoderError
from cmmd.melgan import discriminator_samples, from_official, generator_columns, load_vocoder
from cmmd.melgan import match_mel, official_names, random_biquad, stft_errors

SPEC = ClipSpec()
WEIGHTS, CONFIG = "diffusion_pytorch_model.safetensors", "config.json"


def seeded(**sizes):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MelGANGenerator(**{"ratios": (8, 8, 4), "ngf": 2, **sizes})


def mel_of(t, seed=0):
    return torch.randn(1, 80, t, generator=make_generator(seed)).mul(0.7).sub(3).clamp(min=-5)


@pytest.fixture(scope="module")
def narrow():
    return seeded().fold().requires_grad_(False)


def n_weights(network):
    return sum(p.numel() for p in network.parameters())


# ---- the networks
def test_counts():
    with torch.device("meta"):
        assert n_weights(MelGANGenerator.paper()) == 4_266_050
        assert n_weights(MelGANGenerator.tiny()) == 1_143_106
        assert n_weights(MelGANDiscriminator.paper()) == 16_924_086


def test_receptive_fields():
    assert generator_columns() == 13
    assert [discriminator_samples(i) for i in range(4)] == [4_951, 9_904, 19_810, 39_622]


@cache
def network(ratios):
    return seeded(ratios=ratios)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(t=st.integers(1, 40), ratios=st.sampled_from([(8, 8, 4), (8, 8, 2, 2), (2, 2, 8, 8)]))
def test_any_length_gives_256_samples_a_column(t, ratios):
    with torch.no_grad():
        sound = network(ratios)(mel_of(t))
    assert sound.shape == (1, 256 * t) and torch.isfinite(sound).all()


def test_state_dict_names_are_stable():
    with torch.device("meta"):
        names = set(MelGANGenerator.paper().state_dict())
    assert len(names) == 126
    assert names >= {
        "first.bias",
        "first.parametrizations.weight.original0",
        "first.parametrizations.weight.original1",
        "stages.0.up.parametrizations.weight.original1",
        "stages.3.blocks.2.dilated.parametrizations.weight.original0",
        "stages.3.blocks.2.mix.bias",
        "stages.3.blocks.2.shortcut.bias",
        "last.parametrizations.weight.original1",
    }


def test_start_silent():
    with torch.no_grad():
        sound = seeded(ngf=8).start_silent()(torch.full((2, 80, 9), -5.0))
    assert float(sound.abs().max()) < 1e-6


@pytest.mark.parametrize("frozen", [False, True])
def test_folding_keeps_the_sound_and_leaves_parameters(frozen):
    model = seeded().requires_grad_(not frozen)
    mel = mel_of(6)
    with torch.no_grad():
        before, after = model(mel), model.fold()(mel)
    assert torch.allclose(before, after, atol=1e-6)
    assert set(dict(model.named_parameters())) == set(model.state_dict())
    assert not [n for n in model.state_dict() if "parametrizations" in n]
    model.fold()  # twice is once


def test_the_mel_travels_with_the_weights(tmp_path):
    seeded(f_max=7_600.0, mel_floor=1e-4).save_pretrained(tmp_path)
    for spec in (load_vocoder(tmp_path).spec, MelGANGenerator.from_pretrained(tmp_path).spec):
        assert (spec.f_max, spec.mel_floor, spec.hop_length) == (7_600.0, 1e-4, 256)
    with pytest.raises(TypeError, match="window"):
        MelGANGenerator(window=512)


# ---- the official layout, written from its description
def old_norm(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(layer)


class FlatBlock(nn.Module):
    def __init__(self, c, d):
        super().__init__()
        dilated, mix = nn.Conv1d(c, c, 3, dilation=d), nn.Conv1d(c, c, 1)
        pads = nn.LeakyReLU(0.2), nn.ReflectionPad1d(d)
        self.block = nn.Sequential(*pads, old_norm(dilated), nn.LeakyReLU(0.2), old_norm(mix))
        self.shortcut = old_norm(nn.Conv1d(c, c, 1))

    def forward(self, x):
        return self.shortcut(x) + self.block(x)


def flat(ngf, ratios, n_blocks):
    c = ngf * 2 ** len(ratios)
    layers = [nn.ReflectionPad1d(3), old_norm(nn.Conv1d(80, c, 7))]
    for r in ratios:
        up = nn.ConvTranspose1d(c, c // 2, 2 * r, r, r // 2 + r % 2, r % 2)
        c //= 2
        layers += [nn.LeakyReLU(0.2), old_norm(up), *(FlatBlock(c, 3**i) for i in range(n_blocks))]
    layers += [nn.LeakyReLU(0.2), nn.ReflectionPad1d(3), old_norm(nn.Conv1d(ngf, 1, 7)), nn.Tanh()]
    return nn.ModuleDict({"model": nn.Sequential(*layers)})


@pytest.mark.parametrize("ratios,n_blocks", [((8, 8, 2, 2), 3), ((8, 8, 4), 3), ((4, 3), 2)])
def test_official_layout(ratios, n_blocks):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        theirs = flat(4, ratios, n_blocks)
    layout = {"n_stages": len(ratios), "n_residual_layers": n_blocks}
    ours = seeded(ratios=ratios, ngf=4, n_residual_layers=n_blocks)
    ours.load_state_dict(from_official(theirs.state_dict(), **layout))
    with torch.no_grad():
        a, b = ours(mel_of(12)), theirs["model"](mel_of(12))[:, 0]
    assert float((a - b).abs().max()) < 1e-5
    assert len(official_names(**layout)) * 3 == len(theirs.state_dict())


@pytest.mark.parametrize("name", ["model.2.bias", "model.1.weight", "module.model.1.bias", "x"])
def test_strange_layers_are_named(name):
    with pytest.raises(ValueError, match=name):
        from_official({name: torch.zeros(1)})


# ---- sound
@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    chunk=st.integers(1, 90),
    t=st.integers(1, 120),
    rounds=st.sampled_from([0, 2]),
    data=st.data(),
)
def test_streaming_is_one_pass(narrow, chunk, t, rounds, data):
    mel, pieces = mel_of(t, seed=t), []
    vocoder, left = Vocoder(narrow, rounds=rounds, chunk=chunk), t
    while left:
        pieces.append(data.draw(st.integers(1, left)))
        left -= pieces[-1]
    streamed = torch.cat(list(vocoder.stream(mel.split(pieces, -1))), -1)
    assert streamed.shape == (1, 256 * t)
    assert float((streamed - vocoder.render(mel)).abs().max()) < 1e-5


def test_a_long_window_streams_too():
    model = seeded(win_length=1024).fold()
    spec, mel = replace(SPEC, win_length=1024), mel_of(90)
    whole = Vocoder(model, rounds=2, chunk=200)(mel, spec)
    assert float((Vocoder(model, rounds=2, chunk=11)(mel, spec) - whole).abs().max()) < 1e-5


@pytest.fixture(scope="module")
def drawer():
    "A narrow generator of magnitudes, its changes large enough to matter."
    model = seeded(ratios=(2,), ngf=4, stft_hop=128)
    return model.fold().requires_grad_(False)


@pytest.mark.parametrize("chunk", [1, 5, 48, 128])
def test_phases_that_settle_stream_exactly(drawer, chunk):
    "Rounds turn rounding up, by a thousand or more: hence float64."
    mel = mel_of(160 if chunk > 5 else 24, seed=1)
    whole = Vocoder(drawer, settle=32, rounds=8).render(mel)
    cut = Vocoder(drawer, settle=32, rounds=8, chunk=chunk)
    made = torch.cat(list(cut.stream(mel.split(7, -1))), -1)
    assert made.dtype == torch.float32 and float(whole.abs().max()) > 0.01
    assert float((made - whole).abs().max()) < 1e-5


def test_magnitudes_of_any_length(drawer):
    for t in (1, 2, 3, 4, 9):
        assert Vocoder(drawer, settle=2, rounds=1)(mel_of(t), SPEC).shape == (1, 256 * t)
        with torch.no_grad():
            assert drawer(mel_of(t).double()).shape == (1, 257, 2 * t)
    with torch.device("meta"):
        assert n_weights(MelGANGenerator.spectral()) == 1_413_634


def test_silence_is_silent_in_an_untrained_generator_of_magnitudes():
    model = seeded(ratios=(2,), ngf=4, stft_hop=128).start_silent()
    assert float(Vocoder(model, settle=4)(torch.full((80, 40), -5.0), SPEC).abs().max()) < 1e-6


def test_match_mel_leaves_the_ends_alone():
    sound = 0.1 * torch.randn(1, 256 * 30, generator=make_generator(2))
    made = match_mel(sound, log_mel(sound, SPEC), SPEC, rounds=32)
    apart = (made - sound).abs()
    assert float(apart[:, :512].max()) < 1e-3 and float(apart[:, -512:].max()) < 1e-3


def test_memory_is_bounded(narrow):
    vocoder, widths = Vocoder(narrow, chunk=64), []
    hook = narrow.register_forward_pre_hook(lambda m, given: widths.append(given[0].shape[-1]))
    mel = mel_of(600)
    pieces = [p.shape[-1] for p in vocoder.stream(mel.split(37, -1))]
    hook.remove()
    assert sum(pieces) == 256 * 600 and max(widths) <= 64 + 2 * vocoder.context + 37


@pytest.mark.parametrize(
    "change,numbers",
    [
        ({"n_mels": 64}, "80, got 64"),
        ({"hop_length": 128}, "256, got 128"),
        ({"sample_rate": 22_050}, "16000, got 22050"),
        ({"f_max": 7_600.0}, "8000, got 7600"),
        ({"mel_floor": 1e-3}, "1e-05, got 0.001"),
    ],
)
def test_another_mel_is_refused(narrow, change, numbers):
    with pytest.raises(VocoderError, match=numbers):
        Vocoder(narrow)(mel_of(5), replace(SPEC, **change))


@pytest.mark.parametrize(
    "bad,kind,text",
    [
        (torch.zeros(64, 5), ValueError, "64"),
        (torch.full((80, 5), -100.0), VocoderError, "-100"),
        (torch.full((80, 5), 9.0), VocoderError, "9"),
        (torch.full((80, 5), float("nan")), ValueError, "400 NaN"),
        (torch.zeros(80, 0), ValueError, "80, 0"),
        (torch.zeros(80, 5, dtype=torch.int64), TypeError, "int64"),
        ([[0.0]], TypeError, "list"),
    ],
)
def test_wrong_numbers_are_refused(narrow, bad, kind, text):
    with pytest.raises(kind, match=text):
        Vocoder(narrow)(bad, SPEC)


@pytest.mark.parametrize("given", [{"rounds": 1.5}, {"rounds": -1}, {"chunk": 0}, {"chunk": True}])
def test_wrong_settings_are_refused(narrow, given):
    with pytest.raises((TypeError, ValueError), match=next(iter(given))):
        Vocoder(narrow, **given)


def test_match_mel_mends_levels_and_keeps_silence():
    t = torch.arange(256 * 60) / 16_000
    sound = 0.1 * torch.randn(1, 256 * 60, generator=make_generator(0))
    mel = log_mel(sound, SPEC)
    wrong = sound * (1 + 0.8 * torch.sin(2 * torch.pi * 2 * t))
    before, after = (
        float((log_mel(y, SPEC) - mel)[..., 4:-4].abs().mean())
        for y in (wrong, match_mel(wrong, mel, SPEC))
    )
    assert after < before / 3
    assert float(match_mel(0 * sound, mel, SPEC).abs().max()) == 0
    assert match_mel(sound[:, :256], mel[..., :1], SPEC).shape == (1, 256)


def test_stft_errors_are_zero_for_the_same_sound():
    sound = torch.randn(2, 4096, generator=make_generator(0)) * 0.1
    far, distance = stft_errors(sound, sound)
    assert float(far.max()) < 1e-4 and float(distance.max()) == 0
    with pytest.raises(ValueError, match="4095"):
        stft_errors(sound[:, :-1], sound)


def test_filters_are_never_louder_than_1_and_repeat():
    noise = 2 * torch.rand(4000, generator=make_generator(0)) - 1
    for i in range(25):
        a, b = (random_biquad(noise, sample_rate=16_000, generator=make_generator(i)) for _ in "ab")
        assert torch.equal(a, b) and float(a.abs().max()) <= 1 + 1e-6 and torch.isfinite(a).all()


# ---- weights from strangers
@pytest.fixture
def folder(tmp_path):
    seeded().start_silent().save_pretrained(tmp_path)
    return tmp_path


def refused(folder, *words):
    with pytest.raises(VocoderError) as caught:
        load_vocoder(folder)
    message = str(caught.value)
    assert "\n" not in message and all(w in message for w in words), message


def test_loading(folder):
    mel = mel_of(7)
    sound = load_vocoder(folder)(mel, SPEC)
    model = MelGANGenerator.from_pretrained(folder)
    assert torch.allclose(sound, Vocoder(model)(mel, SPEC), atol=1e-6)
    assert not [p for p in load_vocoder(folder).model.parameters() if p.requires_grad]


def test_loading_does_not_depend_on_grad_mode(folder):
    with torch.no_grad():
        model = load_vocoder(folder).model
    assert set(dict(model.named_parameters())) == set(model.state_dict())


@pytest.mark.parametrize(
    "change",
    [
        {"_class_name": "UNet"},
        {"_class_name": None},
        {"ngf": 10**9},
        {"n_mels": 10**9},
        {"n_residual_layers": 10**9},
        {"win_length": 10**9},
        {"sample_rate": 10**9},
        {"ngf": "2"},
        {"ngf": True},
        {"ngf": 0},
        {"ngf": 2.0},
        {"ngf": 1024, "ratios": [64, 4, 1]},
        {"ratios": [10**9]},
        {"ratios": []},
        {"ratios": [2] * 100},
        {"ratios": "8"},
        {"ratios": [8, 8, 8]},
        {"f_max": "high"},
        {"f_max": 9_000.0},
        {"f_max": float("nan")},
        {"mel_floor": -1},
        {"win_length": 301},
        {"win_length": 100},
        {"n_mels": 64},
        {"surprise": 1},
    ],
    ids=str,
)
def test_a_hostile_config_is_refused(folder, change):
    config = json.loads((folder / CONFIG).read_text()) | change
    (folder / CONFIG).write_text(json.dumps(config))
    refused(folder, str(folder))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, "\x00\xff", '{"ngf": 1'])
def test_a_damaged_config_is_refused(folder, text):
    (folder / CONFIG).write_text(text)
    refused(folder, CONFIG)


def _header(entry):
    header = json.dumps({"first.bias": entry}).encode()
    return struct.pack("<Q", len(header)) + header


DAMAGED = {
    "empty": lambda good: b"",
    "truncated": lambda good: good[: len(good) // 2],
    "only a header": lambda good: good[:4000],
    "a pickle": lambda good: pickle.dumps({"first.bias": [0.0]}),
    "zeros": lambda good: bytes(5000),
    "a huge header": lambda good: struct.pack("<Q", 1 << 60) + good[8:],
    "huge tensor": lambda good: _header(
        {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 4 * 10**18]}
    ),
    "one tensor only": lambda good: (
        _header({"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}) + bytes(4)
    ),
}


@pytest.mark.parametrize("how", DAMAGED)
def test_damaged_weights_are_refused(folder, how):
    path = folder / WEIGHTS
    path.write_bytes(DAMAGED[how](path.read_bytes()))
    refused(folder, str(folder))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(folder, value):
    model = seeded()
    with torch.no_grad():
        model.stages[1].up.bias[0] = value
    model.save_pretrained(folder)
    refused(folder, "stages.1.up.bias", "not finite")


def test_missing_files_and_names(folder, tmp_path):
    (folder / WEIGHTS).unlink()
    refused(folder, WEIGHTS)
    for name in ("no-such-vocoder", tmp_path / "nowhere", "", ".."):
        refused(name, "no vocoder")
