"""FAD, FVD, KVD: closed forms, rank-deficient sets, names that must be earned, loaders offline."""

import json
import shutil
import time
import warnings

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors.torch import load_file, save_file

from cmmd import frechet
from cmmd.core import ClipSpec, make_generator
from cmmd.frechet import (
    I3D,
    Features,
    RandomSoundFeatures,
    RandomVideoFeatures,
    TooFewSamples,
    bootstrap_distance,
    compare_sets,
    fad_per_sample,
    file_sha256,
    frechet_by_size,
    frechet_distance,
    frechet_from_moments,
    kernel_distance,
    load_clap,
    load_i3d,
    metric_name,
    pairwise_distance,
)
from cmmd.mel import log_mel
from cmmd.toy import make_clips

rng = np.random.default_rng(0)
SPEC = ClipSpec.toy()


def moments(x):
    return x.mean(0), np.cov(x, rowvar=False)


# ---- the distances
@pytest.mark.parametrize("d", [1, 2, 7, 64, 200])
def test_equals_scipy_for_full_rank(d):
    x, y = rng.normal(size=(3 * d + 5, d)), rng.normal(0.3, 1.5, (2 * d + 9, d))
    (mx, cx), (my, cy) = moments(x), moments(y)
    cx, cy = np.atleast_2d(cx), np.atleast_2d(cy)
    root = scipy.linalg.sqrtm(cx @ cy).real
    expected = ((mx - my) ** 2).sum() + np.trace(cx + cy - 2 * root)
    assert frechet_distance(x, y) == pytest.approx(expected, abs=1e-8)
    assert frechet_from_moments(mx, cx, my, cy) == pytest.approx(expected, abs=1e-8)


def test_closed_form_of_a_linear_map():
    "y = A x with A symmetric positive: straight ways are cheapest; the covariances do not commute."
    c, a = (m @ m.T / 30 for m in rng.normal(size=(2, 30, 30)))
    shift, zero = rng.normal(size=30), np.zeros(30)
    expected = shift @ shift + np.trace((np.eye(30) - a) @ c @ (np.eye(30) - a))
    assert frechet_from_moments(zero, c, shift, a @ c @ a) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize(("n", "d"), [(2, 64), (20, 64), (50, 512)])
def test_rank_deficient_sets_are_exact_and_real(n, d):
    """Subspaces known: the same points are 0 apart, orthogonal supports add their traces."""
    x = rng.normal(size=(n, d))
    with pytest.warns(TooFewSamples, match=f"{n} clips for {d} features"):
        assert frechet_distance(x, x) < 1e-9
    left, right = x.copy(), rng.normal(size=(n, d))
    left[:, d // 2 :], right[:, : d // 2] = 0, 0
    traces = np.var(left, 0, ddof=1).sum() + np.var(right, 0, ddof=1).sum()
    expected = ((left.mean(0) - right.mean(0)) ** 2).sum() + traces
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TooFewSamples)
        value = frechet_distance(left, right)
        assert value == pytest.approx(expected, abs=1e-8)
        assert frechet_from_moments(*moments(left), *moments(right)) == pytest.approx(value)


def test_scales_from_tiny_to_large():
    x, y = rng.normal(size=(90, 8)), rng.normal(1, 2, (70, 8))
    for scale in (1e-6, 1.0, 1e6):
        relative = frechet_distance(scale * x, scale * y) / scale**2
        assert relative == pytest.approx(frechet_distance(x, y), rel=1e-9)
    constant = np.ones((90, 8))
    assert frechet_distance(constant, constant) == 0


def test_kernel_distance_is_the_double_loop_and_unbiased():
    population = rng.normal(size=(6, 3)), rng.normal(0.5, 1, (5, 3))

    def loop(x, y):
        k = lambda a, b: (a @ b / 3 + 1) ** 3  # noqa: E731
        own = [
            np.mean([k(a, b) for i, a in enumerate(s) for j, b in enumerate(s) if i != j])
            for s in (x, y)
        ]
        return sum(own) - 2 * np.mean([k(a, b) for a in x for b in y])

    assert kernel_distance(*population) == pytest.approx(loop(*population), abs=1e-10)
    x, y = rng.normal(size=(2500, 4)), rng.normal(0.1, 1.1, (1500, 4))  # more than one block
    shift = x.mean(0) - y.mean(0)
    unbiased = shift @ shift - np.cov(x.T).trace() / 2500 - np.cov(y.T).trace() / 1500
    linear = kernel_distance(x, y, degree=1, gamma=1.0, coef=0.0)
    assert linear == pytest.approx(unbiased, abs=1e-8)
    same = [kernel_distance(*rng.normal(size=(2, 40, 4))) for _ in range(300)]
    assert abs(np.mean(same)) < 4 * np.std(same) / 300**0.5 and min(same) < 0 < max(same)


def test_interval_holds_the_expected_distance_in_64_dimensions():
    """Where the plain percentile interval holds it half of the time."""
    scale, reference = np.linspace(1, 0.1, 64), rng.normal(size=(100, 64)) * np.linspace(1, 0.1, 64)

    def draw():
        return rng.normal(size=(100, 64)) * scale + 0.2

    expected, held = np.mean([frechet_distance(draw(), reference) for _ in range(100)]), []
    for i in range(30):
        low, high = bootstrap_distance(
            draw(), reference, generator=make_generator(i), n_resamples=40
        )
        held.append(low <= expected <= high)
    assert np.mean(held) >= 0.8


def test_same_seed_same_interval_and_reference_kept():
    x, y = rng.normal(size=(80, 5)), rng.normal(size=(60, 5))
    ends = [bootstrap_distance(x, y, generator=make_generator(7)) for _ in range(2)]
    assert ends[0] == ends[1] and ends[0][0] < frechet_distance(x, y) < ends[0][1]
    curve = frechet_by_size(x, y, generator=make_generator(1))
    assert list(curve.sizes) == sorted(curve.sizes) and curve.sizes[-1] == 80


# ---- names
def test_only_the_standard_backbone_gives_the_standard_name():
    for kind, backbone in (("FAD", "clap"), ("FVD", "i3d"), ("KVD", "i3d")):
        assert metric_name(kind, backbone) == kind
        for other in ("random64", f"{backbone}-custom", "vggish"):
            assert metric_name(kind, other) == f"{'KD' if kind == 'KVD' else 'FD'}_{other}"


def test_two_backbones_are_never_compared():
    x, y = (Features(rng.normal(size=(9, 3)), "random64", c * 64) for c in "ab")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TooFewSamples)
        for compare in (
            lambda: frechet_distance(x, y),
            lambda: kernel_distance(x, y),
            lambda: bootstrap_distance(x, y, generator=make_generator(0)),
            lambda: compare_sets({"x": x}, y, generator=make_generator(0)),
            lambda: pairwise_distance([x, x], y),
            lambda: fad_per_sample([x], y),
        ):
            with pytest.raises(ValueError, match="of one backbone"):
                compare()


# ---- the offline backbones
def test_the_random_networks_are_these_and_no_others():
    """A changed weight would make stored distances incomparable without notice."""
    ear, eye = RandomSoundFeatures(), RandomVideoFeatures()
    assert ear.sha256 == "08066c9670072c2e4b0e89f709534066f28b188a91720a728fa51a56e0791711"
    assert eye.sha256 == "d2e8d6648e31e93f3f619de42e1cadc3e084a9b5fc974cc58185c1432d00b675"
    state = torch.get_rng_state()
    clips = make_clips(3, seed=5)
    one, two = (eye(clips.video).values for _ in range(2))
    assert np.array_equal(one, two) and torch.equal(state, torch.get_rng_state())
    silent = ear(torch.full((2, 80, 112), -5.0))
    assert np.isfinite(silent.values).all() and silent.backbone == "random64"


def test_sets_of_sound_are_blind_to_their_order():
    mel = log_mel(make_clips(70, seed=5).waveform, SPEC)
    ear = RandomSoundFeatures()
    reference, order = (
        ear(log_mel(make_clips(70, seed=6).waveform, SPEC)),
        torch.randperm(70, generator=make_generator(1)),
    )
    own, dealt = (frechet_distance(ear(m), reference) for m in (mel, mel[order]))
    assert own == pytest.approx(dealt, abs=1e-9)


# ---- CLAP
@pytest.fixture(scope="module")
def clap_folder(tmp_path_factory):
    "A ClapModel of the published parts in small, with random weights."
    from transformers import ClapConfig, ClapFeatureExtractor, ClapModel

    folder = tmp_path_factory.mktemp("clap")
    text = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16}
    audio = {
        "patch_embeds_hidden_size": 16,
        "depths": [1, 1],
        "num_attention_heads": [1, 2],
        "hidden_size": 32,
        "num_hidden_layers": 2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = ClapConfig(
            text_config={**text, "num_attention_heads": 2}, audio_config=audio, projection_dim=16
        )
        ClapModel(config).save_pretrained(folder)
    ClapFeatureExtractor(truncation="rand_trunc", frequency_min=50).save_pretrained(folder)
    return folder


def test_clap_is_transformers_own_and_deterministic(clap_folder):
    import soxr
    from transformers import ClapFeatureExtractor, ClapModel

    waves = make_clips(9, seed=1).waveform
    before = np.random.get_state()[1].copy()
    ours = load_clap(clap_folder)(waves, 16_000)
    assert np.array_equal(before, np.random.get_state()[1])
    assert np.array_equal(ours.values, load_clap(clap_folder)(waves, 16_000).values)
    model = ClapModel.from_pretrained(clap_folder).eval()
    extractor = ClapFeatureExtractor.from_pretrained(clap_folder)
    for i in (0, 8):
        wave = soxr.resample(waves[i].numpy(), 16_000, 48_000, quality="HQ")
        inputs = extractor(wave, sampling_rate=48_000, return_tensors="pt")
        with torch.no_grad():
            out = model.get_audio_features(inputs["input_features"].float()).pooler_output
        assert np.allclose(ours.values[i], out[0].numpy(), atol=1e-5)


def test_clap_refuses_what_would_mislead(clap_folder):
    clap = load_clap(clap_folder)
    for waves, rate, message in (
        (torch.zeros(1, 160_001), 16_000, "at most 10 s"),
        (torch.zeros(1, 100, 2), 16_000, "shape"),
        (torch.full((1, 16_000), torch.nan), 16_000, "NaN"),
        (torch.zeros(1, 16_000), 16, "from 4000"),
        (torch.zeros(1, 16_000, dtype=torch.int16), 16_000, "floating"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            clap(waves, rate)


def test_the_name_clap_must_be_earned(clap_folder, monkeypatch, tmp_path):
    weights = clap_folder / "model.safetensors"
    sha256 = file_sha256(weights)
    assert load_clap(clap_folder).backbone == "clap-custom"
    with pytest.raises(ValueError, match="not the published clap"):
        load_clap(clap_folder, confirm_sha256=sha256)
    with pytest.raises(ValueError, match="must be the weights' own"):
        load_clap(clap_folder, confirm_sha256="0" * 64)
    monkeypatch.setattr(frechet, "CLAP_PUBLISHED", {"hidden_size": 32})  # as if it were
    assert load_clap(clap_folder).backbone == "clap-custom"
    confirmed = load_clap(clap_folder, confirm_sha256=sha256)
    assert (confirmed.backbone, confirmed.sha256) == ("clap", sha256)
    # the hub's cache, under the published name
    hub = tmp_path / "models--laion--clap-htsat-unfused"
    (hub / "refs").mkdir(parents=True)
    (hub / "refs" / "main").write_text("0" * 40)
    shutil.copytree(clap_folder, hub / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    import huggingface_hub

    real = huggingface_hub.snapshot_download
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *a, **k: real(*a, cache_dir=tmp_path, **k)
    )
    assert load_clap().backbone == "clap"


def test_the_published_sizes_are_transformers_defaults():
    """laion/clap-htsat-unfused: 614 MB; its larger sisters are other networks."""
    from transformers import ClapConfig, ClapFeatureExtractor, ClapModel

    extractor = ClapFeatureExtractor(truncation="rand_trunc", frequency_min=50)
    with torch.device("meta"):
        model = ClapModel(ClapConfig())
    assert sum(p.numel() for p in model.parameters()) == 153_492_890
    assert frechet._clap_differs(model, extractor) == ""
    assert "frequency_min is 0" in frechet._clap_differs(model, ClapFeatureExtractor())
    model.config.audio_config.patch_embeds_hidden_size = 128
    assert "patch_embeds_hidden_size is 128" in frechet._clap_differs(model, extractor)


def test_clap_with_weights_missing_or_damaged(clap_folder, tmp_path):
    for name, change in (
        ("lost", lambda w: {k: v for k, v in w.items() if "audio_projection" not in k}),
        ("empty", lambda w: {}),
    ):
        folder = shutil.copytree(clap_folder, tmp_path / name)
        save_file(
            change(load_file(folder / "model.safetensors")),
            folder / "model.safetensors",
            {"format": "pt"},
        )
        with pytest.raises(ValueError, match="lacks .* weights") as caught:
            load_clap(folder)
        assert "\n" not in str(caught.value)
    folder = shutil.copytree(clap_folder, tmp_path / "cut")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="no readable CLAP"):
        load_clap(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="no readable CLAP|lacks"):
        load_clap(folder)


def test_without_weights_three_lines_at_once(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise AssertionError("the loader went to the network")

    monkeypatch.setattr("socket.getaddrinfo", no_network)
    for load in (
        load_clap,
        lambda: load_clap(tmp_path),
        lambda: load_clap("nobody/nothing"),
        lambda: load_clap(tmp_path / "nowhere"),
        lambda: load_i3d(tmp_path / "i3d.safetensors"),
    ):
        began = time.monotonic()
        with pytest.raises(FileNotFoundError) as caught:
            load()
        assert time.monotonic() - began < 5
        lines = str(caught.value).splitlines()
        assert len(lines) == 3 and "get it:" in lines[1] and "load_" in lines[2]
    with pytest.raises(ValueError, match="pickle"):
        load_i3d(tmp_path / "rgb_imagenet.pt")


# ---- I3D
@pytest.fixture(scope="module")
def i3d_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("i3d") / "i3d.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_file(I3D().state_dict(), path)
    return path


def test_i3d_has_the_published_count_and_names(i3d_file):
    names = set(load_file(i3d_file))
    assert sum(p.numel() for p in I3D().parameters()) == 12_697_264
    for name in (
        "Conv3d_1a_7x7.conv3d.weight",
        "Conv3d_2c_3x3.bn.running_var",
        "Mixed_4f.b2b.conv3d.weight",
        "Mixed_5c.b3b.bn.bias",
        "logits.conv3d.bias",
    ):
        assert name in names
    assert len({n.split(".")[0] for n in names}) == 3 + 9 + 1


def test_i3d_round_trip_name_and_refusals(i3d_file, tmp_path):
    video = make_clips(1, seed=1).video[:, :10]
    i3d = load_i3d(i3d_file)
    points = i3d(video)
    assert points.values.shape == (1, 400) and points.backbone == "i3d-custom"
    weights = load_file(i3d_file)
    save_file(
        {k: v for k, v in weights.items() if "num_batches" not in k}, tmp_path / "b.safetensors"
    )
    again = load_i3d(tmp_path / "b.safetensors")
    assert np.array_equal(again(video).values, points.values) and again.sha256 != i3d.sha256
    assert load_i3d(i3d_file, confirm_sha256=i3d.sha256).backbone == "i3d"
    for name, change in (
        ("lost", lambda w: w.pop("logits.conv3d.bias")),
        ("strange", lambda w: w.update(extra=torch.zeros(1))),
        ("wide", lambda w: w.update({"logits.conv3d.bias": torch.zeros(600)})),
        ("nan", lambda w: w.update({"logits.conv3d.bias": torch.full((400,), torch.nan)})),
    ):
        changed = dict(weights)
        change(changed)
        save_file(changed, tmp_path / f"{name}.safetensors")
        with pytest.raises(ValueError, match="287 finite tensors"):
            load_i3d(tmp_path / f"{name}.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(i3d_file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged"):
        load_i3d(tmp_path / "cut.safetensors")
    with pytest.raises(ValueError, match="at least 10 frames"):
        i3d(video[:, :9])
