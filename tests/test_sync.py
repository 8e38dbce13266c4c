"""Scores of timing: mir_eval's own cases, known shifts given back, nonsense refused by name."""

import json
import math
import os
from pathlib import Path

import librosa
import mir_eval
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmmd.core import ClipSpec, make_generator
from cmmd.media import read_media
from cmmd.sync import (
    beat_f_measure,
    beat_scores,
    chance_hit_rate,
    detect_beats,
    event_scores,
    f1_curve,
    mean_lag,
    motion_breaks,
    motion_strength,
    score_curves,
    shifted_rows,
    sync_lag,
)
from cmmd.toy import drum_hits, make_clips

HERE = Path(__file__).resolve().parent.parent
FOLDER = Path(os.environ.get("CMMD_REAL_DATA", HERE.parent / "shared" / "real"))
CASES = sorted((FOLDER / "annotations" / "mir_eval_beat").glob("output*.json"))
SHIFTS = (-0.4, -0.2, -0.1, 0.1, 0.137, 0.2, 0.4)
spec = ClipSpec.toy()
quick = settings(max_examples=40, deadline=None)
slower = settings(max_examples=10, deadline=None)

# Lists of event times with gaps, as they come; and what is no list of event times.
times = st.lists(st.floats(0, 2), max_size=6).map(sorted)
clips_of_times = st.lists(st.tuples(times, times), min_size=1, max_size=4)
tolerances = st.floats(0, 1)
no_times = st.sampled_from(
    [None, 3.0, "late", ["a"], [0.5, 0.1], [math.nan], [math.inf], [[0.1]], {1: 2}]
)


@pytest.fixture(scope="module")
def dances():
    return make_clips(40, kind="dance", seed=0)


@pytest.fixture(scope="module")
def bounces():
    "Clips of 5.4 s, of which windows are cut."
    return make_clips(30, spec=spec.with_frames(54), seed=7)


# ---- events
@quick
@given(pairs=clips_of_times, tolerance=tolerances)
def test_event_scores_are_shares_and_count_every_clip(pairs, tolerance):
    true, made = [list(x) for x in zip(*pairs)]
    before = json.dumps([true, made])
    s = event_scores(true, made, tolerance=tolerance)
    assert 0 <= s.precision <= 1 and 0 <= s.recall <= 1 and 0 <= s.f1 <= 1
    assert s.n_hit <= min(s.n_true, s.n_generated) and s.n_clips == len(pairs)
    assert s.n_true == sum(map(len, true)) and abs(s.offset) <= tolerance
    assert json.dumps([true, made]) == before, "inputs are not changed"


@quick
@given(pairs=clips_of_times)
def test_curves_rise_with_the_tolerance(pairs):
    true, made = [list(x) for x in zip(*pairs)]
    grid = [0.0, 0.05, 0.1, 0.3, 0.5]
    table = score_curves(true, made, grid)
    assert sorted(table) == ["f1", "offset", "precision", "recall"]
    for name in ("f1", "precision", "recall"):
        assert (np.diff(table[name]) >= 0).all()
    assert np.array_equal(table["f1"], f1_curve(true, made, grid))


@quick
@given(shift=st.floats(0.001, 0.17), tolerance=st.floats(0.001, 0.17))
def test_the_truth_late_is_a_step(bounces, shift, tolerance):
    "Below half the smallest gap (360 ms) a late event is near its own true event alone."
    row = shifted_rows(bounces.events, [tolerance], [shift])[shift]
    late = shift <= tolerance
    assert row["f1"][0] == row["recall"][0] == row["precision"][0] == float(late)
    assert row["offset"][0] == pytest.approx(shift if late else 0, abs=1e-6)


def test_reference_rows_are_those_of_the_report(bounces):
    rows = shifted_rows(bounces.events, np.linspace(0, 0.5, 11))
    assert list(rows) == [0.05, 0.1, 0.2, 0.4]
    assert all(row["f1"].shape == (11,) and row["f1"][-1] == 1 for row in rows.values())


# ---- beats
@pytest.mark.skipif(not CASES, reason="mir_eval's cases are not beside the checkout")
@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_mir_evals_own_cases(path):
    "Their F-measure is of beats after 5 s (their trim), window 70 ms; ours leaves the trim out."
    ref, est = (np.loadtxt(path.with_name(f"{x}{path.stem[-2:]}.txt")) for x in ("ref", "est"))
    expected = json.loads(path.read_text())
    trimmed = [mir_eval.beat.trim_beats(x) for x in (ref, est)]
    assert beat_f_measure(*trimmed) == pytest.approx(expected["F-measure"], abs=1e-12)
    pooled = beat_scores([trimmed[0]], [trimmed[1]], tolerance=0.07)
    assert pooled.f_measure == pytest.approx(expected["F-measure"], abs=1e-12)
    assert beat_f_measure(ref, est) == pytest.approx(
        mir_eval.beat.f_measure(ref, est), abs=1e-12
    ), "with the first 5 s as well"
    assert abs(beat_f_measure(ref, est) - expected["F-measure"]) > 1e-4, "the trim matters"
    theirs = mir_eval.beat.evaluate(ref, est)
    assert all(theirs[k] == pytest.approx(v, abs=1e-6) for k, v in expected.items())


@quick
@given(true=times, made=times, tolerance=st.floats(0.001, 1))
def test_the_pooled_measure_of_one_clip_is_mir_evals(true, made, tolerance):
    f = beat_f_measure(true, made, tolerance=tolerance)
    assert f == pytest.approx(beat_scores([true], [made], tolerance=tolerance).f_measure)
    assert f == pytest.approx(beat_f_measure(made, true, tolerance=tolerance)), "symmetric"
    assert beat_f_measure(true, true, tolerance=tolerance) == 1


@quick
@given(pairs=clips_of_times, tolerance=tolerances)
def test_clips_without_beats_are_counted_not_dropped(pairs, tolerance):
    true, made = [list(x) for x in zip(*pairs)]
    s = beat_scores(true, made, tolerance=tolerance)
    assert s.n_clips == len(pairs) and s.tolerance == tolerance
    assert s.n_without_true == sum(not x for x in true)
    assert s.n_without_generated == sum(not x for x in made)
    if s.n_true:
        assert s.hit_rate == s.n_hit / s.n_true
        more = beat_scores([*true, [0.5]], [*made, []], tolerance=tolerance)
        assert more.hit_rate == s.n_hit / (s.n_true + 1), "a missed clip costs"
    if s.n_generated:
        more = beat_scores([*true, []], [*made, [0.5]], tolerance=tolerance)
        assert more.precision == s.n_hit / (s.n_generated + 1), "an invented beat costs"


def test_the_trackers_tempo_scale_is_coarse():
    "At 31.25 looks a second there is no 120: the nearest readings are 125 and 117.2."
    wave, kick = np.zeros(176_000, np.float32), drum_hits(16_000)["kick"]
    for t in np.arange(0.2, 9.9, 0.5):
        wave[int(t * 16_000) :][: len(kick)] += 0.8 * kick
    wave = torch.from_numpy(wave[:160_000])
    coarse, fine = (np.diff(detect_beats(wave, 16_000, hop_length=h)) for h in (512, 160))
    assert set(coarse.round(3)) <= {0.48, 0.512}, "whole looks of 32 ms"
    assert np.mean(abs(fine - 0.5) < 0.011) > 0.9
    assert librosa.beat.beat_track(y=wave.numpy(), sr=16_000)[0] == pytest.approx(117.1875)


@slower
@given(n=st.integers(1, 5000), level=st.sampled_from([0.0, 1e-6, 0.1, 2.0]))
def test_beats_of_anything_are_ascending_times_inside(n, level):
    wave = level * torch.randn(n, generator=make_generator(n))
    kept = wave.clone()
    beats = detect_beats(wave, 16_000)
    assert beats.dtype == np.float64 and beats.ndim == 1 and (np.diff(beats) > 0).all()
    assert torch.equal(wave, kept) and (level > 0 or len(beats) == 0)
    assert ((0 <= beats) & (beats <= max(n, 2048) / 16_000)).all()


def test_luck_at_500_ms_is_no_skill(dances):
    "Random phase at 120 bpm: 40% at 100 ms, all at 500 ms; and another dance's tracked beats."
    steady = [np.arange(0.25, 60, 0.5)] * 100
    other = [np.arange(0.0025 + 0.005 * i, 60, 0.5) for i in range(100)]
    rates = {t: beat_scores(steady, other, tolerance=t).hit_rate for t in (0.1, 0.25, 0.5)}
    assert rates[0.1] == pytest.approx(0.4, abs=0.01) and rates[0.5] == 1 and rates[0.25] > 0.99
    tapped = [detect_beats(w, 16_000) for w in dances.waveform]
    for tolerance, low, high in ((0.1, 0.3, 0.55), (0.5, 0.8, 1.0)):
        generator = make_generator(0)
        assert low < chance_hit_rate(tapped, tolerance=tolerance, generator=generator) < high
    own = beat_scores(dances.events, tapped, tolerance=0.1).hit_rate
    assert own > 0.15 + chance_hit_rate(
        dances.events, tapped, tolerance=0.1, generator=make_generator(0)
    )


def test_chance_is_repeatable_and_needs_two_clips(dances):
    def draw(seed):
        return chance_hit_rate(dances.events, tolerance=0.1, generator=make_generator(seed))

    assert draw(1) == draw(1) != draw(2)
    with pytest.raises(ValueError, match="n must be at least 2"):
        chance_hit_rate([[0.5]], tolerance=0.1, generator=make_generator(0))


# ---- motion
def square(places) -> np.ndarray:
    frames = np.zeros((len(places), 16, 128, 3), np.uint8)
    for frame, x in zip(frames, places):
        frame[4:12, x : x + 20] = 200
    return frames


@slower
@given(speed=st.integers(1, 4), at=st.integers(3, 8), stops=st.booleans())
def test_motion_breaks_where_it_turns_or_stops(speed, at, stops):
    k = np.arange(12)
    places = speed * (np.minimum(k, at) if stops else at - np.abs(k - at))
    breaks = motion_breaks(square(places + 22))
    assert breaks.shape == (12,) and np.flatnonzero(breaks).tolist() == [at]
    assert not motion_breaks(square(speed * k)).any(), "even motion does not break"


def test_motion_is_nothing_in_a_still_picture_and_starts_at_zero(bounces):
    still = torch.full((6, 16, 16, 3), 77, dtype=torch.uint8)
    assert not motion_strength(still).any() and not motion_breaks(still).any()
    video = bounces.video[0, :18]
    kept = video.clone()
    motion = motion_strength(video)
    assert motion.shape == (18,) and motion.dtype == np.float64
    assert motion[0] == 0 and (motion[1:] > 0).all() and torch.equal(video, kept)
    assert np.array_equal(motion, motion_strength(video.numpy()))
    assert motion_strength(video[:1]).tolist() == [0]


# ---- sync without labels
def window(clips, i, shift, *, n=18, first=9):
    "n frames from `first` on, and the sound of as long that began `shift` s earlier: late by it."
    start = round((first / 10 - shift) * 16_000)
    return clips.video[i, first : first + n], clips.waveform[i, start : start + n * 1600]


def test_known_shifts_of_toy_clips_come_back(bounces):
    curves = {
        shift: [sync_lag(*window(bounces, i, shift), spec) for i in range(30)]
        for shift in (0.0, *SHIFTS)
    }
    zero = mean_lag(curves[0.0])
    assert abs(zero.lag) < 0.03 and zero.height > 0.5
    for shift in SHIFTS:
        assert mean_lag(curves[shift]).lag - zero.lag == pytest.approx(shift, abs=0.01)
    sounding = [i for i in range(30) if len(bounces.events[i])]
    lags = np.array([[curves[s][i].lag - s for s in curves] for i in sounding])
    assert np.mean(np.abs(lags - zero.lag) < 0.05) > 0.75, "single clips"


def test_anothers_sound_has_no_peak(bounces):
    own = [sync_lag(*window(bounces, i, 0.0), spec) for i in range(30)]
    wrong = [
        sync_lag(window(bounces, i, 0.0)[0], window(bounces, (i + 1) % 30, 0.0)[1], spec)
        for i in range(30)
    ]
    assert mean_lag(own).height > 3 * mean_lag(wrong).height
    assert np.mean([x.height for x in own]) > np.mean([x.height for x in wrong])


@slower
@given(
    i=st.integers(0, 29), n=st.integers(4, 30), gain=st.floats(0.2, 1), max_lag=st.floats(0.01, 0.3)
)
def test_a_lag_is_within_its_range_and_changes_no_input(bounces, i, n, gain, max_lag):
    video, sound = window(bounces, i, 0.0, n=n)
    sound = gain * sound
    kept = video.clone(), sound.clone()
    found = sync_lag(video, sound, spec, max_lag=max_lag)
    assert abs(found.lag) <= max_lag + 0.005 and -1 <= found.height <= 1
    assert found.lags.shape == found.correlation.shape and np.abs(found.correlation).max() <= 1
    assert torch.equal(video, kept[0]) and torch.equal(sound, kept[1])
    again = sync_lag(video.numpy(), sound, spec, max_lag=max_lag)
    assert again.lag == found.lag and np.array_equal(again.correlation, found.correlation)


def test_nothing_to_compare_is_lag_0_height_0(bounces):
    video, sound = window(bounces, 0, 0.0)
    still = video[:1].expand(18, -1, -1, -1)
    for some in (sync_lag(video, 0 * sound, spec), sync_lag(still, sound, spec)):
        assert some.lag == some.height == 0 and not some.correlation.any()
        assert some.lags.shape == some.correlation.shape == (201,)
    assert mean_lag([some, some]).height == 0
    assert mean_lag([some, sync_lag(video, sound, spec)]).height > 0


# Real clips, at their own frame rate, without their first and last half second. Of seven known
# shifts, these give all back within 50 ms; the numbers are the lag of the unshifted clip in ms,
# its height and the largest error in ms, measured once. The lags scatter from -500 to 329 ms:
# nobody knows the true ones, so only the difference to the shifted lag is tested.
WORKING = {
    "anvil.mp4": (30, -43, 0.70, 11),
    "conga_24p6fps.mp4": (25, -13, 0.34, 4),
    "dog_14p96fps.mp4": (15, -12, 0.78, 1),
    "drumkit_21p5fps.mp4": (22, 76, 0.53, 2),
    "bassdrum_vgg.mp4": (30, 230, 0.47, 1),
    "dog_vas02677.mp4": (30, -138, 0.58, 1),
    "cough_15p25fps.mp4": (15, -328, 0.20, 7),
    "doublebass_vgg.mp4": (30, 165, 0.44, 1),
    "fireworks_vas03051.mp4": (30, 329, 0.40, 11),
    "pancake_kitchen.mkv": (30, -500, 0.19, 2),
}
# These do not: another peak of the curve wins for some shifts (shifts given back, of seven).
# hammer: one stroke later fits nearly as well; stick: few hits in 5 s, height 0.25.
FAILING = {
    "bongo_vgg.mp4": (30, 6),
    "hammer_vas00323.mp4": (24, 6),
    "chopping_cabbage.mp4": (30, 5),
    "drumkit_vas02480.mp4": (25, 5),
    "dance_cgi_aist_music_8.mp4": (25, 5),
    "vlog_mpeg4_mp3.avi": (25, 5),
    "stick_on_metal.mp4": (15, 3),
    "canary_mono.mp4": (30, 3),
    "ripping_paper_portrait.mp4": (30, 2),
    "rabbit320_vp8.webm": (30, 2),
}
QUICK = ("anvil.mp4", "conga_24p6fps.mp4", "dog_14p96fps.mp4", "drumkit_21p5fps.mp4")


def lags_of(name: str, fps: int) -> np.ndarray:
    "Lag without a shift, then lag minus shift for each of SHIFTS, in s."
    path = FOLDER / "video" / name
    if not path.is_file():
        pytest.skip(f"{name} is not beside the checkout")
    grid = ClipSpec(fps=fps, frame_size=64)
    media = read_media(path, spec=grid)
    seconds = min(len(media.video) / fps, len(media.waveform) / 16_000)
    first, n = int(0.5 * fps), int((seconds - 1) * fps)
    found = []
    for shift in (0.0, *SHIFTS):
        start = round((first / fps - shift) * 16_000)
        sound = media.waveform[start : start + round(n / fps * 16_000)]
        found.append(sync_lag(media.video[first : first + n], sound, grid).lag - shift)
    return np.array(found)


@pytest.mark.parametrize("name", QUICK)
def test_known_shifts_of_real_clips_come_back(name):
    lags = lags_of(name, WORKING[name][0])
    assert abs(lags - lags[0]).max() < 0.05
    assert lags[0] == pytest.approx(WORKING[name][1] / 1000, abs=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("name", [x for x in WORKING if x not in QUICK])
def test_known_shifts_of_more_real_clips_come_back(name):
    lags = lags_of(name, WORKING[name][0])
    assert abs(lags - lags[0]).max() < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("name", FAILING)
def test_real_clips_that_fail_are_still_the_same(name):
    fps, expected = FAILING[name]
    lags = lags_of(name, fps)
    assert abs(int((abs(lags - lags[0]) < 0.05)[1:].sum()) - expected) <= 1


# ---- wrong arguments
@quick
@given(bad=no_times, which=st.booleans())
def test_what_is_no_time_is_refused_by_name(bad, which):
    good = [0.5]
    name = "true" if which else "generated"
    pair = (bad, good) if which else (good, bad)
    calls = [
        lambda: beat_f_measure(*pair),
        lambda: beat_scores([pair[0]], [pair[1]], tolerance=0.1),
        lambda: score_curves([pair[0]], [pair[1]], [0.1]),
    ]
    for call in calls:
        with pytest.raises((TypeError, ValueError), match=name):
            call()


@pytest.mark.parametrize("bad", [None, 3, "ab", {}, [[0.5], [0.5]], []])
def test_what_is_no_list_of_clips_is_refused_by_name(bad):
    for call in (
        lambda: beat_scores([[0.5]], bad, tolerance=0.1),
        lambda: shifted_rows(bad if bad != [[0.5], [0.5]] else None, [0.1]),
        lambda: event_scores(bad, [[0.5]], tolerance=0.1),
    ):
        with pytest.raises((TypeError, ValueError), match="true_list|generated_list"):
            call()


@quick
@given(bad=st.sampled_from([-0.1, math.nan, "wide", None, True, [0.1]]))
def test_a_wrong_tolerance_is_refused_by_name(bad):
    for call in (
        lambda: beat_scores([[0.5]], [[0.5]], tolerance=bad),
        lambda: beat_f_measure([0.5], [0.5], tolerance=bad),
        lambda: chance_hit_rate([[1.0], [2.0]], tolerance=bad, generator=make_generator(0)),
    ):
        with pytest.raises((TypeError, ValueError), match="tolerance"):
            call()


videos = st.sampled_from(
    [
        None,
        "film",
        [[1], [1, 2]],
        torch.zeros(5, 8, 8, 3),
        torch.zeros(5, 8, 8, dtype=torch.uint8),
        np.zeros((5, 8, 8, 4), np.uint8),
        np.zeros((2, 8, 8, 3), np.uint8),
        np.zeros((5, 0, 8, 3), np.uint8),
    ]
)
sounds = st.sampled_from(
    [
        None,
        np.zeros(9000),
        torch.zeros(28_800, dtype=torch.int16),
        torch.zeros(2, 28_800),
        torch.zeros(0),
        torch.full((28_800,), math.nan),
        torch.full((28_800,), math.inf),
        torch.zeros(100),
    ]
)


@quick
@given(bad=videos)
def test_what_is_no_video_is_refused_by_name(bad):
    for call in (motion_breaks, lambda v: sync_lag(v, torch.zeros(28_800), spec)):
        with pytest.raises((TypeError, ValueError), match="video must"):
            call(bad)


@quick
@given(bad=sounds)
def test_what_is_no_sound_is_refused_by_name(bad):
    with pytest.raises((TypeError, ValueError), match="waveform must"):
        sync_lag(np.zeros((18, 8, 8, 3), np.uint8), bad, spec)


@quick
@given(
    name=st.sampled_from(["sample_rate", "hop_length"]),
    bad=st.sampled_from([0, -1, 16_000.5, math.nan, math.inf, "fast", None, True]),
)
def test_wrong_settings_of_the_tracker_are_refused_by_name(name, bad):
    given = {"sample_rate": 16_000, "hop_length": 512, name: bad}
    with pytest.raises((TypeError, ValueError), match=name):
        detect_beats(torch.zeros(9000), **given)


@pytest.mark.parametrize("bad", [0, -1, 1.8, 5, math.nan, "far", None])
def test_a_wrong_max_lag_is_refused_by_name(bounces, bad):
    with pytest.raises((TypeError, ValueError), match="max_lag"):
        sync_lag(*window(bounces, 0, 0.0), spec, max_lag=bad)


@pytest.mark.parametrize("bad", [None, [], [1], "ab"])
def test_a_wrong_list_of_lags_is_refused_by_name(bad):
    with pytest.raises((TypeError, ValueError), match="lags must"):
        mean_lag(bad)


def test_lags_of_different_ranges_are_not_averaged(bounces):
    pair = window(bounces, 0, 0.0)
    both = [sync_lag(*pair, spec, max_lag=x) for x in (0.5, 1.0)]
    with pytest.raises(ValueError, match="lags must"):
        mean_lag(both)
