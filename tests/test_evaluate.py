"""The evaluator: known answers for its statistics, the same numbers twice, nothing half-written."""

import json
import math
import os
import shutil
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from project import ROOT
from scipy import stats
from scipy.spatial.distance import cdist

from cmmd.checkpoint import to_json
from cmmd.core import ClipSpec, make_generator
from cmmd.datasets import save_dataset, toy_dataset
from cmmd.evaluate import (
    CEILING,
    CHANCE,
    METRICS,
    REPORT_FILES,
    UNSEEN,
    EvalConfig,
    FilesConfig,
    Report,
    box_plot,
    clip_mean,
    clip_values,
    compare_paired,
    estimate,
    evaluate,
    evaluate_files,
    generate_for,
    holm,
    media_files,
    memorised,
    nearest_neighbours,
    observe,
    reference_notes,
    signed_rank,
    toy_material,
)
from cmmd.latents import load_vae
from cmmd.media import write_clip, write_wav
from cmmd.pipeline import find_vocoder, load_model
from cmmd.sync import beat_scores, bootstrap_interval, event_scores
from cmmd.toy import make_clips

SPEC = ClipSpec.toy()
REAL = Path(os.environ.get("CMMD_REAL_DATA", ROOT.parent / "shared" / "real")) / "video"
QUICK = EvalConfig(
    n_clips=4, steps=2, v2a_weight=0.0, a2v_weight=0.0, n_show=1, n_train=8, train_data="toy:bounce"
)


@pytest.fixture(scope="module")
def models():
    model = load_model("toy-ncmmd")
    return model, load_vae(model.config.vae), find_vocoder()


@pytest.fixture(scope="module")
def report(models):
    "Two names for one model, both directions."
    return evaluate({"<b>one</b> $x$": models[0], "two": models[0]}, QUICK, device="cpu")


def draws(*shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


# ---- Wilcoxon and its effect size
def test_signed_rank_of_darwins_maize():
    "W- = 10 + 14 = 24 of 120 by hand: r = (96 - 24) / 120; p by all 2**15 signs."
    d = np.array([49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48])
    p, r, ties = signed_rank(d)
    sums = np.array([0])
    for rank in stats.rankdata(abs(d)):
        sums = np.concatenate([sums, sums + rank])
    assert p == pytest.approx(2 * np.mean(sums <= 24), abs=1e-12)
    assert r == pytest.approx(0.6) and ties == 0


def test_signed_rank_of_many_with_ties_is_the_corrected_normal():
    "z = (W - n(n+1)/4) / sqrt(n(n+1)(2n+1)/24 - sum(t**3 - t)/48)"
    d = np.round(draws(150) + 0.15, 1)
    p, r, ties = signed_rank(d)
    kept = d[d != 0]
    n, ranks = len(kept), stats.rankdata(np.round(abs(kept), 12))
    up = ranks[kept > 0].sum()
    t = np.unique(ranks, return_counts=True)[1]
    z = (up - n * (n + 1) / 4) / math.sqrt(n * (n + 1) * (2 * n + 1) / 24 - (t**3 - t).sum() / 48)
    assert p == pytest.approx(2 * stats.norm.sf(abs(z)), rel=1e-6)
    assert r == pytest.approx((2 * up - ranks.sum()) / ranks.sum()) and ties == 150 - n > 0


def test_signed_rank_of_nothing():
    assert signed_rank(np.zeros(9)) == (1.0, 0.0, 9)
    assert signed_rank([0, 0, 0.2]) == (1.0, 1.0, 2)
    assert signed_rank([1.0, -1.0])[1] == 0
    p, r, ties = signed_rank([0.3 - 0.2, 0.2 - 0.1, -0.1])  # ties but for the last bit
    assert r == pytest.approx(1 / 3) and ties == 0


@pytest.mark.parametrize("bad", [[], [np.nan, 1], [[1, 2]], [np.inf]])
def test_signed_rank_refuses(bad):
    with pytest.raises(ValueError, match="differences"):
        signed_rank(bad)


# ---- Holm
def test_holm_by_hand():
    assert np.allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])


@pytest.mark.parametrize("seed", range(5))
def test_holm_is_closed_testing_with_bonferroni(seed):
    "p_i = max over all sets with i of (size x smallest p): what the step-down rule shortens."
    p = np.random.default_rng(seed).uniform(size=6) ** 3
    closed = np.zeros(6)
    for size in range(1, 7):
        for group in combinations(range(6), size):
            both = min(1, size * p[list(group)].min())
            for i in group:
                closed[i] = max(closed[i], both)
    assert np.allclose(holm(p), closed)


def test_holm_keeps_the_order_and_its_limits():
    p = np.random.default_rng(3).uniform(size=40)
    adjusted = holm(p)
    assert (adjusted >= p).all() and (adjusted <= 1).all()
    assert (np.diff(adjusted[np.argsort(p)]) >= 0).all() and len(holm([])) == 0
    for bad in ([-0.1], [1.1], [float("nan")], [[0.1]]):
        with pytest.raises(ValueError, match="p_values"):
            holm(bad)


# ---- intervals
def test_the_interval_of_f1_is_that_of_notebook_60():
    clips = make_clips(30, seed=5)
    late = [e + 0.03 * (i % 5) for i, e in enumerate(clips.events)]
    given = {"tolerance": 0.1, "n_resamples": 300}
    low, high = bootstrap_interval(clips.events, late, generator=make_generator(1), **given)
    values = clip_values([{"events": e} for e in clips.events], [[{"events": e} for e in late]])
    ours = estimate(values["f1_100"], generator=make_generator(1), n_resamples=300)
    assert (ours.low, ours.high) == pytest.approx((low, high), abs=1e-12)
    direct = event_scores(clips.events, late, tolerance=0.1)
    assert ours.value == pytest.approx(direct.f1)
    assert clip_mean(values["precision_100"]) == pytest.approx(direct.precision)
    assert clip_mean(values["recall_100"]) == pytest.approx(direct.recall)


def test_the_interval_of_a_mean_is_the_textbooks():
    x = draws(500)
    e = estimate(x, generator=make_generator(0))
    half = 1.96 * x.std(ddof=1) / math.sqrt(500)
    assert e.low == pytest.approx(x.mean() - half, abs=0.01)
    assert e.high == pytest.approx(x.mean() + half, abs=0.01)


def test_missing_values_are_counted_and_infinite_ones_refused():
    e = estimate([1.0, math.nan, 3.0], generator=make_generator(0))
    assert (e.value, e.n, e.n_missing) == (2.0, 2, 1)
    empty = estimate([math.nan] * 3, generator=make_generator(0))
    assert math.isnan(empty.value) and empty.n == 0 and empty.text() == "-"
    for bad in ([1.0, math.inf], [], np.zeros((2, 3)), np.zeros((2, 2, 2))):
        with pytest.raises(ValueError, match="values"):
            estimate(bad, generator=make_generator(0))


def test_compare_paired():
    a = draws(80)
    b = a + 0.1 + 0.2 * draws(80, seed=1)
    c, d = (compare_paired(*pair, generator=make_generator(0)) for pair in ((a, b), (b, a)))
    assert c.difference == pytest.approx((b - a).mean()) and c.low < c.difference < c.high
    assert (d.difference, d.effect) == pytest.approx((-c.difference, -c.effect)) and d.p == c.p
    assert (c.p, c.effect) == signed_rank(b - a)[:2]
    order = np.random.default_rng(0).permutation(80)
    again = compare_paired(a[order], b[order], generator=make_generator(0))
    assert (again.p, again.effect) == pytest.approx((c.p, c.effect))
    a[3] = b[5] = math.nan
    assert compare_paired(a, b, generator=make_generator(0)).n_missing == 2
    none = compare_paired([math.nan], [1.0], generator=make_generator(0))
    assert none.n == 0 and none.p == 1 and math.isnan(none.difference)
    with pytest.raises(ValueError, match="same clips"):
        compare_paired(a, b[:-1], generator=make_generator(0))


def test_pooled_ratios_are_compared_as_ratios():
    a, b = (
        np.array([[1.0, 2.0], [0.0, 0.0], [3.0, 4.0]]),
        np.array([[2.0, 2.0], [0.0, 0.0], [3.0, 4.0]]),
    )
    c = compare_paired(a, b, generator=make_generator(0))
    assert c.difference == pytest.approx(5 / 6 - 4 / 6) and c.n_ties == 2 and c.effect == 1


def test_a_false_alarm_is_as_rare_as_promised():
    "Equal models, 5 metrics, 150 experiments: Holm keeps the family below about 5%."
    rng, alarms = np.random.default_rng(0), 0
    for _ in range(150):
        p = [signed_rank(rng.normal(size=25))[0] for _ in range(5)]
        alarms += holm(p).min() < 0.05
    assert alarms <= 15


# ---- clips and their notes
def test_generations_of_a_clip_are_one_clip():
    clips = toy_material("bounce", 5, seed=3, spec=SPEC)
    notes = observe(clips, "v2a", spec=SPEC)
    once, thrice = (clip_values(notes, [notes] * k) for k in (1, 3))
    for key in once:
        assert len(once[key]) == len(thrice[key]) == 5
        assert np.allclose(
            clip_mean(once[key][:, None] if once[key].ndim == 2 else once[key][:, None, None]),
            clip_mean(thrice[key][:, None] if once[key].ndim == 2 else thrice[key][:, None, None]),
            equal_nan=True,
        )


def test_beats_are_scored_as_in_notebook_60():
    clips = toy_material("dance", 6, seed=3, spec=SPEC)
    notes = observe(clips, "v2a", spec=SPEC)
    moved = [n | {"beats": [t + 0.08 for t in n["beats"]]} for n in notes]
    values = clip_values(notes, [moved])
    for ms in (100, 500):
        direct = beat_scores(
            [n["beats"] for n in notes], [n["beats"] for n in moved], tolerance=ms / 1000
        )
        assert clip_mean(values[f"beat_hit_{ms}"]) == pytest.approx(direct.hit_rate)


def test_reference_rows_stand_in_order():
    clips = toy_material("bounce", 24, seed=4, spec=SPEC)
    found = observe(clips, "v2a", spec=SPEC)
    true = [x | {"events": e.tolist()} for x, e in zip(found, clips.events)]
    rows = reference_notes(
        true, found, clips, direction="v2a", spec=SPEC, generator=make_generator(0)
    )
    f1 = {row: clip_mean(clip_values(true, notes)["f1_100"]) for row, notes in rows.items()}
    assert f1[CEILING] > 0.97 and f1["truth, 50 ms late"] > 0.97
    assert f1["truth, 200 ms late"] < 0.1 and 0.1 < f1[CHANCE] < 0.45
    assert len(rows) == 6


def test_noise_belongs_to_the_clip(models):
    clips = toy_material("bounce", 5, seed=UNSEEN, spec=SPEC)
    for direction in ("v2a", "a2v"):
        made = generate_for(models, clips, direction=direction, config=QUICK)
        other = generate_for(
            models, clips.pick([4, 2]), direction=direction, config=replace(QUICK, batch_size=1)
        )
        key = "mel" if direction == "v2a" else "latents"
        torch.testing.assert_close(
            getattr(made, key)[[4, 2]], getattr(other, key), atol=1e-3, rtol=1e-3
        )
        again = generate_for(models, clips, direction=direction, config=QUICK, generation=1)
        assert (getattr(again, key) - getattr(made, key)).abs().mean() > 0.01


def test_nearest_neighbours_are_scipys():
    x, train = torch.from_numpy(draws(7, 3, 5)), torch.from_numpy(draws(600, 3, 5, seed=1))
    away, which = nearest_neighbours(x, train)
    full = cdist(x.flatten(1), train.flatten(1)) / math.sqrt(15)
    assert np.allclose(away, full.min(1), atol=1e-6) and (which == full.argmin(1)).all()
    assert nearest_neighbours(train[590:], train)[0].max() == 0
    with pytest.raises(ValueError, match="one shape"):
        nearest_neighbours(x, train[:, :2])
    assert memorised([0.0] * 9, [1.0] * 20, generator=make_generator(0)).value == 1
    assert memorised([2.0] * 9, [1.0] * 20, generator=make_generator(0)).value == 0


# ---- the report
def test_equal_weights_are_equal(report):
    tests = [c for r in report.data["results"].values() for c in r["comparisons"]]
    assert len(tests) >= 6 and all(c["p_holm"] == 1 and c["difference"] == 0 for c in tests)
    assert "no difference shown" in report.summary()
    assert len({m["sha256"] for m in report.data["models"].values()}) == 1


def test_the_report_holds_what_it_promises(report):
    data = json.loads(to_json(report.data))  # strict: no NaN
    assert set(data["results"]) == {"v2a", "a2v"}
    for direction, result in data["results"].items():
        assert len(result["clips"]["two"][0]) == 4 and {CEILING, CHANCE} <= set(
            result["metrics"]["f1_100"]
        )
        assert all(
            e["n"] + e["n_missing"] == 4
            for rows in result["metrics"].values()
            for e in rows.values()
        )
        assert all(
            "FVD" not in name and "FAD" not in name for s in result["sets"].values() for name in s
        )
        assert len(result["backbone"]["sha256"]) == 64 and set(result["sets"]) >= {
            "two",
            "other true clips",
        }
        assert result["memorisation"]["two"]["n_train"] == 8
        assert len(result["curve"]["tolerance_s"]) == len(result["curve"]["f1"]["two"]) == 26
    assert set(data["results"]["v2a"]["metrics"]) == set(METRICS)
    assert data["protocol"]["seed"] == 0 and data["made_with"]["torch"]


def test_the_page_is_whole_small_and_safe(report, tmp_path):
    page = report.save(tmp_path / "out").joinpath("report.html").read_text()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(REPORT_FILES)
    assert "<b>one" not in page and "&lt;b&gt;one" in page and "<script" not in page
    assert "http://" not in page and "https://" not in page and len(page) < 5e6
    assert page.count("<video") == 2 * 3 and page.count("<svg") >= 6


def test_the_same_again(report, models):
    names = {"<b>one</b> $x$": models[0], "two": models[0]}
    again = evaluate(names, QUICK, device="cpu")
    assert to_json(again.data["results"]) == to_json(report.data["results"])


def test_nothing_is_left_of_an_interrupted_report(report, tmp_path, monkeypatch, models):
    def stop(share):
        if share > 0.3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate({"one": models[0]}, QUICK, device="cpu", on_part=stop)
    monkeypatch.setattr("cmmd.evaluate.report_page", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report.save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_report_is_never_replaced(report, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError):
        report.save(tmp_path, overwrite=True)
    report.save(tmp_path / "r")
    with pytest.raises(FileExistsError, match="overwrite"):
        report.save(tmp_path / "r")
    report.save(tmp_path / "r", overwrite=True)


def test_dancers_are_heard_and_not_seen(models):
    config = replace(QUICK, data="toy:dance", train_data=None, n_show=0)
    data = evaluate({"one": models[0]}, config, device="cpu").data
    assert "f1_100" in data["results"]["v2a"]["metrics"]
    assert "f1_100" not in data["results"]["a2v"]["metrics"]
    assert any("no events" in name for name in data["warnings"])


def test_stored_clips(models, tmp_path):
    save_dataset(toy_dataset(5, models[1], seed=UNSEEN), tmp_path / "clips.safetensors")
    config = replace(
        QUICK,
        data=str(tmp_path / "clips.safetensors"),
        train_data=str(tmp_path / "clips.safetensors"),
        directions=("v2a",),
    )
    data = evaluate({"one": models[0]}, config, device="cpu").data
    result = data["results"]["v2a"]
    assert result["metrics"]["f1_100"][CEILING]["value"] == 1
    assert max(result["memorisation"]["one"]["unseen"]) < 1e-4  # it is its own training set


@pytest.mark.parametrize(
    "change, word",
    [
        ({"n_clips": 2}, "n_clips"),
        ({"steps": 0}, "steps"),
        ({"data": "clips.pt"}, "data"),
        ({"train_data": "toy:chess"}, "train_data"),
        ({"directions": ()}, "directions"),
        ({"directions": ("both",)}, "directions"),
        ({"v2a_weight": -1}, "v2a_weight"),
        ({"generations": 0}, "generations"),
        ({"seed": "x"}, "seed"),
    ],
)
def test_wrong_protocols_are_named(change, word):
    with pytest.raises((ValueError, TypeError), match=word):
        EvalConfig(**change)


def test_wrong_models_are_named(models):
    for wrong in ([], {}, ["toy-cmmd", "toy-cmmd"]):
        with pytest.raises(ValueError, match="models"):
            evaluate(wrong, QUICK)
    with pytest.raises(ValueError, match="nobody"):
        evaluate(["nobody"], QUICK)


def test_box_plot_marks_the_quartiles():
    drawn = box_plot({"a": [0.0, 0.25, 0.5, 0.75, 1.0], "b": [None, math.nan]}, label="<x>")
    assert 'x="245.0"' in drawn and 'width="170.0"' in drawn and "&lt;x&gt;" in drawn
    assert drawn.count("<rect") == 1 and box_plot({}, label="x") == ""


# ---- files
@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    "References, and copies of them: two late, one without picture, some that are none."
    made, truth = (tmp_path_factory.mktemp(name) for name in ("made", "truth"))
    clips = toy_material("bounce", 9, seed=7, spec=SPEC)
    loud = [i for i, e in enumerate(clips.events) if len(e) > 1][:6]
    for k, i in enumerate(loud):
        name = ("same", "late", "<i>x</i>", "sound", "twice", "gone")[k].replace("/", "")
        write_clip(truth / f"{name}.mp4", clips.video[i], clips.waveform[i], spec=SPEC)
        wave = (
            torch.cat([torch.zeros(3200), clips.waveform[i]])[:28_800]
            if k == 1
            else clips.waveform[i]
        )
        if name == "sound":
            write_wav(made / "sound.wav", wave, spec=SPEC)
        elif name != "gone":
            write_clip(made / f"{name}.mp4", clips.video[i], wave, spec=SPEC)
    write_wav(made / "twice.wav", clips.waveform[0], spec=SPEC)
    write_clip(made / "other.mp4", clips.video[8], clips.waveform[8], spec=SPEC)
    (made / "broken.mp4").write_bytes((made / "same.mp4").read_bytes()[:200])
    (made / "empty.wav").touch()
    (made / "notes.txt").write_text("not media")
    return made, truth


def test_files_are_paired_by_name(folders):
    made, truth = folders
    data = evaluate_files(made, truth).data
    assert set(data["files"]["pairs"]) == {"same", "late", "<i>x<i>", "sound", "twice"}
    assert set(data["files"]["generated"]["skipped"]) == {"broken.mp4", "empty.wav"}
    f1 = dict(
        zip(data["files"]["pairs"], data["results"]["files"]["values"]["f1_100"]["generated"])
    )
    assert f1["same"] == f1["sound"] == 1 and f1["late"] < 0.5
    heights = data["results"]["files"]["values"]["sync_height"]
    where = data["files"]["pairs"].index("sound")
    assert heights["generated"][where] == pytest.approx(heights[CEILING][where], abs=0.05)
    text = json.dumps(data["warnings"])
    assert "broken.mp4" in text and "same name twice" in text and str(made) not in text


def test_files_report_is_a_report(folders, tmp_path):
    report = evaluate_files(*folders, FilesConfig(n_show=2))
    assert isinstance(report, Report)
    page = report.save(tmp_path / "r").joinpath("report.html").read_text()
    assert "<i>x" not in page and "&lt;i&gt;x" in page and page.count("<video") == 4
    assert report.data["results"]["files"]["comparisons"][0]["metric"] == "sync_height"


def test_files_without_partners(folders, tmp_path):
    made, truth = folders
    lonely = tmp_path / "lonely"
    lonely.mkdir()
    shutil.copy(made / "other.mp4", lonely)
    data = evaluate_files(lonely, truth).data
    assert data["files"]["pairs"] == [] and data["results"]["files"]["comparisons"] == []
    assert "f1_100" not in data["results"]["files"]["metrics"]
    assert data["results"]["files"]["metrics"]["sync_height"]["generated"]["n"] == 1
    assert "files without a partner" in data["warnings"]


def test_folders_that_hold_nothing(folders, tmp_path):
    with pytest.raises(ValueError, match="no media file"):
        media_files(tmp_path)
    with pytest.raises(ValueError, match="no folder"):
        media_files(tmp_path / "gone")
    (tmp_path / "bad.mp4").write_text("x")
    with pytest.raises(ValueError, match="none of 1"):
        evaluate_files(tmp_path, folders[1])


def test_links_are_not_followed(folders, tmp_path):
    (tmp_path / "a.mp4").symlink_to(folders[0] / "same.mp4")
    with pytest.raises(ValueError, match="no media file"):
        media_files(tmp_path)


@pytest.mark.skipif(not REAL.is_dir(), reason="shared/real is not here")
def test_real_files(tmp_path):
    "Real clips against themselves, some with the sound of another, all kinds of containers."
    names = [
        "anvil.mp4",
        "stick_on_metal.mp4",
        "dog_14p96fps.mp4",
        "no_audio_h265_10fps.mp4",
        "bbb_1s_vp8.webm",
        "park_10fps_portrait_short.mp4",
    ]
    made, truth = tmp_path / "made", tmp_path / "truth"
    for folder in (made, truth):
        folder.mkdir()
        for name in names:
            shutil.copy(REAL / name, folder)
    data = evaluate_files(made, truth, FilesConfig(seconds=5)).data
    assert data["files"]["generated"]["n_read"] == 6 and not data["files"]["generated"]["skipped"]
    assert len(data["files"]["pairs"]) == 5  # one has no sound
    values = data["results"]["files"]["metrics"]
    assert (
        values["f1_50"]["generated"]["value"] == values["beat_hit_100"]["generated"]["value"] == 1
    )
    assert any("pairs without sound" in name for name in data["warnings"])
    assert any("cut to 5 s" in name for name in data["warnings"])
    c = data["results"]["files"]["comparisons"][0]
    assert c["difference"] == 0 and c["p"] == 1
