"What the switches of the samplers promise, on a small model of two streams."

import hashlib
import itertools
import math
import subprocess
import sys
from dataclasses import dataclass, replace
from unittest.mock import patch

import pytest
import torch
from project import ENVIRONMENT, ROOT
from torch import nn

from cmmd import guidance
from cmmd.core import ClipSpec, make_generator
from cmmd.guidance import DDIM, NOISE_DIRECTIONS, generate, guided_predict, predict, sampling_steps


@dataclass(frozen=True)
class Settings:
    clip: ClipSpec = ClipSpec.toy()
    num_train_steps: int = 1000
    audio_snr_scale: float = 1 / 40


class Pair(nn.Module):
    "The smallest model whose streams look at each other; counts its calls."

    def __init__(self):
        super().__init__()
        self.config, self.calls = Settings(), 0
        g = make_generator(0, "pair")
        video, audio = self.config.clip.video_shape[1], self.config.clip.audio_shape[0]
        self.see = nn.Parameter(0.1 * torch.randn(video, audio, generator=g))
        self.hear = nn.Parameter(0.1 * torch.randn(audio, video, generator=g))

    def forward(self, video, audio, t):
        self.calls += 1
        share = (t / 1000).view(-1, 1, 1)
        sound = torch.tanh(self.see @ audio.mean(-1, keepdim=True)) * share
        sight = torch.tanh(self.hear @ video.mean((1, 3, 4))[..., None])
        return 0.1 * video + sound[:, None, :, :, None], 0.1 * audio * share + sight


MODEL = Pair()
SPEC = MODEL.config.clip
GIVEN = {
    "video": torch.randn(2, *SPEC.video_shape, generator=make_generator(1)),
    "audio": torch.randn(2, *SPEC.audio_shape, generator=make_generator(2)),
}
SWITCHES = [
    dict(zip(("noise_direction", "condition_noise", "gradient", "n_resample"), values))
    for values in itertools.product(
        NOISE_DIRECTIONS, ("fixed", "fresh"), ("sum", "normalised"), (1, 2)
    )
]
every_switch = pytest.mark.parametrize(
    "switches", SWITCHES, ids=lambda s: "-".join(map(str, s.values()))
)
both_sides = pytest.mark.parametrize("side", GIVEN)


def make(side, weight=0.0, *, steps=4, seed=0, **switches):
    "The stream that was made for the given one."
    made = generate(
        MODEL,
        **{side: GIVEN[side]},
        guidance_weight=weight,
        num_sample_steps=steps,
        solver=DDIM(**switches),
        generator=make_generator(seed),
    )
    assert torch.equal(getattr(made, side), GIVEN[side]), "the condition must come back unchanged"
    return made.audio if side == "video" else made.video


def backward_passes(function, *args, **kwargs):
    with patch.object(torch.autograd, "grad", wraps=torch.autograd.grad) as grad:
        return function(*args, **kwargs), grad.call_count


# ---- lambda = 0
@both_sides
@every_switch
def test_no_weight_is_replacement_whatever_the_gradient(side, switches):
    "Bit for bit what the sampler makes where guidance does not exist; nothing is differentiated."

    def unguided(*args, **kwargs):
        raise AssertionError("guidance was computed")

    with patch.object(guidance, "guided_predict", unguided):
        made, count = backward_passes(make, side, **switches)
    others = switches | {"gradient": "sum", "guided_times": (0.3, 0.4)}
    assert count == 0 and not made.requires_grad
    assert torch.equal(made, make(side, **others)) and made.isfinite().all()


def test_no_weight_is_the_loop_written_out():
    g = make_generator(0)
    noise = [torch.randn(x.shape, generator=g) for x in GIVEN.values()]
    z = list(noise)
    for t, now, after in sampling_steps(MODEL, 4):
        z[0] = now[0].sqrt() * GIVEN["video"] + (1 - now[0]).sqrt() * noise[0]
        with torch.no_grad():
            x0, eps = predict(MODEL, z, t, now)
        z[1] = after[1].sqrt() * x0[1] + (1 - after[1]).sqrt() * eps[1]
    torch.testing.assert_close(make("video"), z[1], atol=1e-5, rtol=1e-5)


# ---- guided
@both_sides
@every_switch
def test_a_weight_changes_what_is_made_with_one_backward_pass_a_step(side, switches):
    made, count = backward_passes(make, side, 0.5, **switches)
    assert count == 4 * switches["n_resample"]
    assert not torch.equal(made, make(side, **switches)) and made.isfinite().all()
    assert all(p.grad is None for p in MODEL.parameters())


@both_sides
@pytest.mark.parametrize("times", [(0.0, 0.0), (0.999, 1.0), (0.45, 0.46)])
def test_times_without_a_step_are_no_guidance(side, times):
    shares = [t / 1000 for t, *_ in sampling_steps(MODEL, 4)]
    inside = sum(times[0] <= share <= times[1] for share in shares)
    made, count = backward_passes(make, side, 5.0, guided_times=times)
    assert count == inside
    assert torch.equal(made, make(side)) == (inside == 0)


def test_thirds_of_the_times_share_the_backward_passes():
    thirds = ((0, 1 / 3), (1 / 3, 2 / 3), (2 / 3, 1))
    counts = [backward_passes(make, "video", 1.0, steps=24, guided_times=t)[1] for t in thirds]
    assert sum(counts) == 24 and min(counts) > 0


@both_sides
def test_normalised_gradient_has_a_size_of_one(side):
    "Weight times amplitude is then the root mean square of the push, for each clip by itself."
    target = ("audio", "video").index(side)
    t, now, _ = sampling_steps(MODEL, 10)[4]
    z = [torch.randn(x.shape, generator=make_generator(3)) for x in GIVEN.values()]
    x0, eps = predict(MODEL, z, t, now)
    one = {"target": target, "condition": GIVEN[side], "guidance_weight": 0.25, "normalised": True}
    guided, same = guided_predict(MODEL, z, t, alpha_bars=now, **one)
    size = (guided[target] - x0[target]).square().flatten(1).mean(1).sqrt()
    torch.testing.assert_close(
        size, (0.25 * now[target].sqrt()).expand(2).float(), rtol=1e-3, atol=0
    )
    assert all(torch.equal(a, b) for a, b in zip(same, eps))
    assert torch.equal(guided[1 - target], x0[1 - target])


# ---- evaluations
@pytest.mark.parametrize("n_resample", [1, 2, 3])
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_evaluations_are_counted(n_resample, weight):
    "Each step as often as asked for; guidance evaluates nothing a second time."
    MODEL.calls = 0
    seen = []
    make(
        "audio",
        weight,
        steps=12 // n_resample,
        n_resample=n_resample,
        on_step=lambda i, n, video, audio: seen.append((i, n)),
    )
    assert MODEL.calls == 12 and seen == [(i, 12) for i in range(12)]


@pytest.mark.parametrize("side", [*GIVEN, None])
def test_resampling_ends_in_a_clean_signal(side):
    solver = DDIM(n_resample=3)
    times = [t for t, *_ in solver.steps(MODEL, 4)]
    assert times == [t for t, *_ in sampling_steps(MODEL, 4) for _ in range(3)]
    given = {side: GIVEN[side]} if side else {"shape": (2, 18)}
    args = {"num_sample_steps": 4, "solver": solver, "generator": make_generator(0)}
    made, last = [], []
    solver = replace(solver, on_step=lambda i, n, *x0: last.append(x0))
    made = generate(MODEL, **given, **(args | {"solver": solver}))
    for name, x, estimate in zip(("video", "audio"), (made.video, made.audio), last[-1]):
        if name != side:
            assert torch.equal(x, estimate), "the last step must end in the estimate itself"


# ---- the same again
@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"noise_direction": "fresh", "condition_noise": "fresh"},
        {"n_resample": 2, "gradient": "normalised"},
    ],
)
def test_one_generator_for_each_clip_makes_clips_independent(switches):
    def alone(i):
        return generate(
            MODEL,
            video=GIVEN["video"][i],
            guidance_weight=1.0,
            num_sample_steps=4,
            solver=DDIM(**switches),
            generator=[make_generator(k) for k in i],
        ).audio

    torch.testing.assert_close(alone([0, 1])[1], alone([1])[0], atol=1e-5, rtol=1e-5)
    assert torch.equal(alone([1]), alone([1])) and not torch.equal(alone([0]), alone([1]))


AGAIN = """
import hashlib, sys
import torch
sys.path.insert(0, "tests")
torch.set_num_threads(1)
from test_guidance import all_switches
print(hashlib.sha256(all_switches().numpy().tobytes()).hexdigest())
"""


def all_switches():
    more = {"noise_direction": "fresh", "condition_noise": "fresh", "n_resample": 2}
    return torch.cat([make(s, 1.0, **k).flatten() for s in GIVEN for k in ({}, more)])


def test_same_seed_same_result_in_another_process():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        here = hashlib.sha256(all_switches().numpy().tobytes()).hexdigest()
    finally:
        torch.set_num_threads(threads)
    there = subprocess.run(
        [sys.executable, "-c", AGAIN],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert there.returncode == 0, there.stderr
    assert there.stdout.strip() == here


# ---- bad input: one clear line
@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"weight": math.nan}, "guidance_weight"),
        ({"weight": -1.0}, "guidance_weight"),
        ({"guided_times": (0.7, 0.3)}, "guided_times"),
        ({"guided_times": (0.0, 2.0)}, "guided_times"),
        ({"guided_times": (math.nan, 1.0)}, "guided_times"),
        ({"condition_noise": "none"}, "condition_noise"),
        ({"gradient": "mean"}, "gradient"),
        ({"noise_direction": "mine"}, "noise_direction"),
        ({"n_resample": 0}, "n_resample"),
    ],
)
def test_bad_requests_are_named(bad, says):
    with pytest.raises(ValueError, match=says) as error:
        make("video", **bad)
    assert "\n" not in str(error.value) and "got" in str(error.value)
