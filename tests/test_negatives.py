"Negatives: exact shifts, honest swaps, draws that nothing but the clip's generator changes."

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from cmmd.core import ClipSpec, make_generator
from cmmd.datasets import ClipDataset, Recordings
from cmmd.joint import reflect_shift
from cmmd.mel import log_mel
from cmmd.negatives import (
    NEGATIVES,
    NegativePlan,
    draw_plan,
    make_negatives,
    shift,
    shifted_audio,
    shifted_video,
    split_swap,
    swap,
)
from cmmd.sync import detect_onsets
from cmmd.toy import make_clips

SPEC, MARGIN, SHIFTS = ClipSpec.toy(), 4, (-4, -3, -2, 2, 3, 4)
few = settings(max_examples=60, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def long():
    "18 recordings of 26 frames; number 16 is silent."
    return make_clips(18, spec=SPEC.with_frames(SPEC.n_frames + 2 * MARGIN), seed=2)


@pytest.fixture(scope="module")
def data(long):
    "Their middles; every eighth pixel stands for a latent, and mels are in decades."
    video = long.video[:, :, ::8, ::8].movedim(-1, 2).float() / 127.5 - 1
    middle = long.waveform[:, MARGIN * 1600 : -MARGIN * 1600]
    ids = tuple(f"clip{i}" for i in range(len(video)))
    around = Recordings(video, long.waveform)
    return ClipDataset(video[:, MARGIN:-MARGIN], log_mel(middle, SPEC), ids, 0.0, 1.0, around)


def window_events(long, i, k=0):
    times = long.events[i] - (MARGIN - k) / SPEC.fps
    return times[(times >= 0) & (times < SPEC.duration)]


def plan(i, kind="shift", *, n_clips=18, seed=0):
    g = make_generator(seed, "negative", i)
    return draw_plan(g, index=i, n_clips=n_clips, n_frames=18, kind=kind)


def all_by(k, n=18):
    return torch.full((n,), k)


# ---------------------------------------------------------------- shift
@st.composite
def clips_and_shifts(draw):
    n = draw(st.integers(2, 12))
    by = draw(st.lists(st.integers(1 - n, n - 1), min_size=1, max_size=4))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64]))
    x = torch.arange(len(by) * 2 * n * 3).view(len(by), 2, n, 3).to(dtype)
    return x, torch.tensor(by)


@few
@given(clips_and_shifts())
def test_shift_moves_each_clip_by_its_own_number(case):
    x, by = case
    before, n = x.clone(), x.shape[2]
    moved = shift(x, by, 2)
    assert moved.shape == x.shape and moved.dtype == x.dtype and torch.equal(x, before)
    assert torch.equal(moved, shift(x, by, -2))
    for row, k in enumerate(by.tolist()):
        assert torch.equal(moved[row], reflect_shift(x[row], k, 1))
        kept = slice(k, n) if k >= 0 else slice(0, n + k)
        assert torch.equal(moved[row][:, kept], x[row][:, max(0, -k) : n - max(0, k)])


@pytest.mark.parametrize("k", SHIFTS)
def test_a_shift_moves_every_event_by_exactly_k_tenths(data, long, k):
    "Exact events, exact samples, exact frames; heard onsets within one column."
    start = (MARGIN - k) * 1600
    window = long.waveform[:, start : start + SPEC.n_samples]
    clip = long.waveform[:, MARGIN * 1600 : -MARGIN * 1600]
    late, early, n = (window, clip, k) if k > 0 else (clip, window, -k)
    assert torch.equal(late[:, n * 1600 :], early[:, : -n * 1600])
    audio = shifted_audio(data, range(18), all_by(k), spec=SPEC)
    assert audio.shape == data.audio.shape and audio.dtype == data.audio.dtype
    torch.testing.assert_close(audio, log_mel(window, SPEC))
    video = shifted_video(data, range(18), all_by(k))
    late, early = (video, data.video) if k > 0 else (data.video, video)
    assert video.dtype == data.video.dtype and torch.equal(late[:, n:], early[:, :-n])
    n_heard = 0
    for i in range(18):
        stay = window_events(long, i) + k / SPEC.fps
        stay = stay[(stay >= 0) & (stay < SPEC.duration)]
        assert np.isin(stay.round(9), window_events(long, i, k).round(9)).all()
        heard = detect_onsets(data.audio[i], SPEC) + k / SPEC.fps
        heard, after = heard[(heard > 0.1) & (heard < 1.7)], detect_onsets(audio[i], SPEC)
        assert all(np.abs(after - t).min() <= 1 / SPEC.mel_rate for t in heard)
        n_heard += len(heard)
    assert n_heard > 20


def test_beyond_the_recording_it_reflects(data):
    by = torch.tensor([4, 5, -6])
    bare = replace(data, around=None)
    video, audio = shifted_video(data, [0, 1, 2], by), shifted_audio(data, [0, 1, 2], by, spec=SPEC)
    assert torch.equal(video[1:], shift(data.video[1:3], by[1:], 1))
    assert torch.equal(audio[1:], shift(data.audio[1:3], torch.tensor([31, -38]), -1))
    assert torch.equal(shifted_video(bare, [0], by[:1]), shift(data.video[:1], by[:1], 1))
    assert not torch.equal(video[0], shift(data.video[:1], by[:1], 1)[0])


def test_half_a_column_cannot_be_had_from_the_mel(data):
    "2 frames are 12.5 columns, 4 are 25: only then columns and samples agree."
    for k, columns, equal in ((2, 12, False), (2, 13, False), (4, 25, True)):
        exact = shifted_audio(data, range(16), all_by(k, 16), spec=SPEC)[..., columns + 1 : -1]
        moved = shift(data.audio[:16], all_by(columns, 16), -1)[..., columns + 1 : -1]
        assert torch.allclose(exact, moved, atol=1e-3) == equal


def test_a_shifted_silence_is_the_same_silence(data, long):
    silent = [i for i in range(18) if not len(long.events[i])]
    assert silent == [16]
    for k in SHIFTS:
        moved = shifted_audio(data, range(18), all_by(k), spec=SPEC)
        assert [i for i in range(18) if torch.equal(moved[i], data.audio[i])] == silent
        moved = shifted_video(data, range(18), all_by(k))
        assert not any(torch.equal(a, b) for a, b in zip(moved, data.video))


# ---------------------------------------------------------------- split and swap
@few
@given(st.data())
def test_split_swap_takes_each_place_from_one_of_the_two(draws):
    b, n = draws.draw(st.integers(1, 4)), draws.draw(st.integers(2, 10))
    x = torch.arange(b * 3 * n).view(b, 3, n)
    other = x + 1000
    at = torch.tensor(draws.draw(st.lists(st.integers(1, n - 1), min_size=b, max_size=b)))
    left = torch.tensor(draws.draw(st.lists(st.booleans(), min_size=b, max_size=b)))
    made = split_swap(x, other, at=at, keep_left=left, dim=-1)
    for row in range(b):
        own = (made[row] < 1000).all(0)
        assert torch.equal(own, (torch.arange(n) < at[row]) == left[row])
        assert own.any() and not own.all()
    assert torch.equal(made % 1000, x) and made.dtype == x.dtype
    rest = split_swap(x, other, at=at, keep_left=~left, dim=-1)
    assert torch.equal(made + rest, x + other)
    assert torch.equal(swap(x, other), other) and swap(x, other) is not other


# ---------------------------------------------------------------- the draws
def test_the_draws_are_what_they_always_were():
    "Written down in another process: stored runs are only repeatable while these hold."
    plans = [plan(i, "mixture", n_clips=40) for i in range(10)]
    assert [p.by for p in plans] == [-4, 2, 3, -4, 3, -3, -4, 3, -2, -2]
    assert [p.other for p in plans] == [14, 4, 30, 9, 31, 2, 2, 32, 17, 5]
    assert plan(0, n_clips=40) == NegativePlan("shift", -4, 14, 11 / 18, False)
    assert [p.kind for p in plans] == [
        "shift",
        "shift",
        "shift",
        "swap",
        "shift",
        "shift",
        "swap",
        "split_swap",
        "split_swap",
        "shift",
    ]


@few
@given(st.data())
def test_a_plan_is_always_possible_and_its_kind_changes_nothing_else(draws):
    n_clips, n_frames = draws.draw(st.integers(2, 200)), draws.draw(st.integers(3, 40))
    index, seed = draws.draw(st.integers(0, n_clips - 1)), draws.draw(st.integers(0, 10**6))
    high = draws.draw(st.integers(1, n_frames - 1))
    low = draws.draw(st.integers(1, high))
    plans = [
        draw_plan(
            make_generator(seed),
            index=index,
            n_clips=n_clips,
            n_frames=n_frames,
            kind=kind,
            shift_frames=(low, high),
        )
        for kind in NEGATIVES
    ]
    assert [p.kind for p in plans[:3]] == list(NEGATIVES[:3]) and plans[3].kind in NEGATIVES[:3]
    assert len({replace(p, kind="swap") for p in plans}) == 1
    p = plans[0]
    assert low <= abs(p.by) <= high and p.other != index and 0 <= p.other < n_clips
    assert 1 <= round(p.at * n_frames) <= n_frames - 1


def test_the_draws_are_fair():
    "Chi-square of 4,000 plans below its 99.99% quantile; never the clip itself."
    plans = [plan(5, "mixture", n_clips=11, seed=seed) for seed in range(4000)]
    for name, n in (("other", 10), ("by", 6), ("at", 17), ("keep_left", 2), ("kind", 3)):
        counts = Counter(getattr(p, name) for p in plans)
        assert len(counts) == n
        mean = len(plans) / n
        assert sum((c - mean) ** 2 for c in counts.values()) / mean < chi2.ppf(0.9999, n - 1), name
    assert 5 not in {p.other for p in plans}


# ---------------------------------------------------------------- the batch
@pytest.mark.parametrize("modality", ("video", "audio"))
@pytest.mark.parametrize("kind", NEGATIVES)
def test_negatives_of_a_batch(data, long, kind, modality):
    "Shape, dtype, difference from the positive, untouched data, no say of batch or order."
    places = [i for i in range(18) if len(window_events(long, i))]
    plans, before = [plan(i, kind) for i in places], data.fingerprint
    made = make_negatives(data, places, plans, modality=modality, spec=SPEC)
    positive = getattr(data, modality)[places]
    assert made.shape == positive.shape and made.dtype == positive.dtype
    equal = [p.kind for p, a, b in zip(plans, made, positive) if torch.equal(a, b)]
    assert not equal or modality == "audio" and set(equal) == {"split_swap"}  # silence for silence
    some = [places.index(i) for i in (9, 3)]
    again = make_negatives(data, (9, 3), [plans[r] for r in some], modality=modality, spec=SPEC)
    torch.testing.assert_close(again, made[some])
    assert data.fingerprint == before
    for row, p in enumerate(plans):
        if p.kind == "swap":
            assert torch.equal(made[row], getattr(data, modality)[p.other])


# ---------------------------------------------------------------- wrong input
WRONG = {
    "unknown kind": (lambda d: plan(0, "reverse"), "kind must be one of 'shift', 'split_swap'"),
    "no other clip": (lambda d: plan(0, "swap", n_clips=1), "need another clip to swap with"),
    "mixture of one": (lambda d: plan(0, "mixture", n_clips=1), "another clip to swap with"),
    "shift too long": (
        lambda d: draw_plan(make_generator(0), index=0, n_clips=2, n_frames=4),
        "shift_frames must lie within 1 to 3",
    ),
    "shift not two": (
        lambda d: draw_plan(make_generator(0), index=0, n_clips=2, n_frames=9, shift_frames=(2,)),
        "shift_frames must be",
    ),
    "index outside": (lambda d: plan(18), "index must hold places from 0 to 17"),
    "seed for generator": (
        lambda d: draw_plan(3, index=0, n_clips=2, n_frames=18),
        "generator must be a torch.Generator",
    ),
    "clip too short": (lambda d: shift(d.video, all_by(18), 1), "by must be smaller than the clip"),
    "smallest int64": (lambda d: shift(d.video, all_by(-(2**63)), 1), "by must be smaller"),
    "shift by floats": (
        lambda d: shift(d.video, torch.ones(18), 1),
        "by must be a tensor of int64",
    ),
    "shift by three": (lambda d: shift(d.video, all_by(2, 3), 1), "by must have shape"),
    "the batch as time": (lambda d: shift(d.video, all_by(2), 0), "dim must be"),
    "a list": (lambda d: shift([1, 2], all_by(1, 2), 1), "x must be a torch tensor"),
    "other shape": (lambda d: swap(d.video, d.audio), "other must be of x's shape"),
    "split at the end": (
        lambda d: split_swap(
            d.video, d.video, at=all_by(18), keep_left=torch.ones(18, dtype=bool), dim=1
        ),
        "at must lie inside the clip, 1 to 17",
    ),
    "sides as numbers": (
        lambda d: split_swap(d.video, d.video, at=all_by(3), keep_left=all_by(1), dim=1),
        "keep_left must be a tensor of bools",
    ),
    "a plan too few": (
        lambda d: make_negatives(d, [0, 1], [plan(0)], modality="audio", spec=SPEC),
        "plans must be one for each of 2 clips",
    ),
    "unknown modality": (
        lambda d: make_negatives(d, [0], [plan(0)], modality="text", spec=SPEC),
        "modality must be one of",
    ),
    "place outside": (lambda d: shifted_video(d, [18], all_by(2, 1)), "index must hold places"),
    "no place": (
        lambda d: make_negatives(d, [], [], modality="audio", spec=SPEC),
        "at least one place, got none",
    ),
    "partner outside": (
        lambda d: make_negatives(
            d, [0], [replace(plan(0, "swap"), other=99)], modality="audio", spec=SPEC
        ),
        "plans' other must hold places",
    ),
    "another spec": (
        lambda d: shifted_audio(d, [0], all_by(2, 1), spec=ClipSpec.toy(hop_length=128)),
        "spec must be that of the clips",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_explained_in_one_line(data, case):
    call, words = WRONG[case]
    with pytest.raises((ValueError, TypeError)) as caught:
        call(data)
    assert words in str(caught.value) and "\n" not in str(caught.value)


junk = st.one_of(
    st.none(), st.integers(-5, 5), st.floats(), st.text(max_size=3), st.lists(st.integers(-3, 3))
)


@few
@given(junk, junk, junk, junk)
def test_junk_is_refused_by_name(a, b, c, d):
    x = torch.zeros(2, 3, 4)
    calls = (
        lambda: shift(a, b, c),
        lambda: shift(x, a, 1),
        lambda: split_swap(x, a, at=b, keep_left=c, dim=d),
        lambda: swap(a, b),
        lambda: draw_plan(a, index=b, n_clips=c, n_frames=d),
        lambda: draw_plan(make_generator(0), index=a, n_clips=b, n_frames=c, shift_frames=d),
    )
    for call in calls:
        try:
            call()
        except (ValueError, TypeError) as error:
            assert " must " in str(error) or "need another clip" in str(error), error
