"""Procedural sounds: the same in any order and process, exact onsets, bounded, clear errors."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from project import ROOT

from cmmd.sounds import SOUND_KINDS, Sounds, make_sounds

RATE = 16_000
SHORT = {"duration": 0.5, "seed": 3}
quick = settings(max_examples=15, deadline=None)


def same(a: Sounds, b: Sounds) -> bool:
    onsets = len(a) == len(b) and all(map(np.array_equal, a.onsets, b.onsets))
    return onsets and a.kinds == b.kinds and torch.equal(a.waveform, b.waveform)


def part(sounds: Sounds, first: int, last: int) -> Sounds:
    piece = slice(first, last)
    return Sounds(sounds.waveform[piece], sounds.onsets[piece], sounds.kinds[piece], RATE)


@pytest.fixture(scope="module")
def stream() -> Sounds:
    return make_sounds(40, **SHORT)


@quick
@given(start=st.integers(0, 39), n=st.integers(1, 3))
def test_a_sound_depends_on_seed_and_index_alone(stream, start, n):
    n = min(n, 40 - start)
    assert same(make_sounds(n, start=start, **SHORT), part(stream, start, start + n))


def test_another_seed_is_another_stream(stream):
    other = make_sounds(40, duration=0.5, seed=4)
    assert not (other.waveform == stream.waveform).all(1)[other.waveform.any(1)].any()


def test_the_same_bits_in_another_process():
    code = (
        "import hashlib; from cmmd.sounds import make_sounds as m; "
        "s = m(6, duration=0.5, seed=3, start=7); "
        "print(hashlib.sha256(s.waveform.numpy().tobytes()).hexdigest(), s.kinds)"
    )
    command = [sys.executable, "-c", code]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    here = make_sounds(6, start=7, **SHORT)
    digest = hashlib.sha256(here.waveform.numpy().tobytes()).hexdigest()
    assert told.strip() == f"{digest} {here.kinds}"


@pytest.mark.parametrize("kind", SOUND_KINDS)
@pytest.mark.parametrize("rate", [16_000, 22_050])
def test_notes_are_finite_audible_and_repeatable(kind, rate):
    for seed in range(10):
        note, again = (SOUND_KINDS[kind](np.random.default_rng(seed), rate) for _ in range(2))
        assert note.ndim == 1 and len(note) < 4 * rate and np.isfinite(note).all()
        assert np.abs(note).max() > 1e-5 and np.array_equal(note, again)


@pytest.mark.parametrize("kind", SOUND_KINDS)
def test_onsets_ascend_lie_inside_and_begin_the_sound(kind):
    made = make_sounds(8, duration=2.0, seed=1, kinds=(kind,))
    for wave, onsets, name in zip(made.waveform.numpy(), made.onsets, made.kinds):
        firsts = (onsets * RATE).round().astype(int)
        assert name in (kind, "silence") and (name == kind or not wave.any())
        assert np.array_equal(firsts / RATE, onsets) and onsets.dtype == np.float64
        assert (np.diff(onsets) > 0.0499).all() and (firsts > 0).all() and (onsets < 2).all()
        if len(firsts) and not wave[: firsts[0] // 2].any():  # no floor of noise
            assert np.flatnonzero(wave)[0] - firsts[0] in (0, 1)


@quick
@given(seed=st.integers(0, 2**40), duration=st.floats(0.1, 1.0))
def test_shape_and_peak(seed, duration):
    made = make_sounds(2, duration=duration, seed=seed)
    assert made.waveform.shape == (2, round(duration * RATE)) and len(made) == 2
    assert made.waveform.dtype == torch.float32 and made.waveform.abs().max() < 0.97
    assert made.sample_rate == RATE


not_whole = st.one_of(st.floats(), st.text(), st.booleans(), st.none())
WRONG = {
    "n": not_whole | st.integers(max_value=0),
    "seed": not_whole | st.integers(max_value=-1),
    "start": not_whole | st.integers(max_value=-1),
    "sample_rate": not_whole | st.integers(max_value=13_999),
    "duration": st.one_of(
        st.floats(max_value=0.099),
        st.floats(min_value=3601),
        st.just(float("nan")),
        st.text(),
        st.booleans(),
        st.none(),
    ),
    "kinds": st.lists(st.text().filter(lambda x: x not in SOUND_KINDS), min_size=1).map(tuple)
    | st.sampled_from([(), None, "bar"]),
}


@pytest.mark.parametrize("name", WRONG)
@quick
@given(data=st.data())
def test_wrong_arguments_are_named(name, data):
    given_value = data.draw(WRONG[name])
    with pytest.raises((ValueError, TypeError), match=rf"^{name} must be"):
        make_sounds(**{"n": 1, "duration": 0.2, name: given_value})
