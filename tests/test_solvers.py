"""The multistep solvers: our noise levels, DDIM as first order, guidance, seeds, few steps."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

from cmmd.core import ClipSpec, make_generator
from cmmd.guidance import DDIM, generate, sampling_steps
from cmmd.solvers import DPMSolver, UniPC, two_schedulers

SPEC = ClipSpec(frame_size=16, n_frames=4, n_mels=8)
SOLVERS = {
    "order 1": DPMSolver(order=1),
    "2M": DPMSolver(),
    "2M, re-derived": DPMSolver(noise_direction="rederived"),
    "order 3": DPMSolver(order=3),
    "SDE": DPMSolver(stochastic=True),
    "UniPC": UniPC(),
    "UniPC 3": UniPC(order=3),
}


class Coupled:
    "A smooth model in which each stream looks at the other, so that guidance has a gradient."

    config = SimpleNamespace(clip=SPEC, num_train_steps=1000, audio_snr_scale=1 / 20)

    def __call__(self, video, audio, t):
        seen, heard = video.flatten(1).mean(1), audio.flatten(1).mean(1)
        return (
            torch.tanh(video + heard.view(-1, 1, 1, 1, 1)),
            torch.tanh(0.5 * audio + seen.view(-1, 1, 1)),
        )


MODEL = Coupled()


def video(n: int) -> torch.Tensor:
    return torch.randn(n, *SPEC.video_shape, generator=make_generator("video"))


def made(solver, *, steps=8, seed=0, n=2, **more) -> torch.Tensor:
    generator = [make_generator(seed, i) for i in range(n)]
    given = video(n)
    out = generate(
        MODEL, video=given, num_sample_steps=steps, solver=solver, generator=generator, **more
    )
    assert torch.equal(out.video, given)
    return out.audio


@pytest.mark.parametrize("kind", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
@pytest.mark.parametrize("count", [1, 2, 20, 200, 1000])
def test_levels_are_ours(kind, count):
    steps = sampling_steps(MODEL, count)
    for s, scheduler in enumerate(two_schedulers(kind, steps, solver_order=2)):
        got = 1 / (1 + scheduler.sigmas**2)
        want = torch.stack([now[s] for _, now, _ in steps] + [torch.ones(()).double()])
        torch.testing.assert_close(got, want, rtol=1e-9, atol=0)
        assert scheduler.timesteps.tolist() == [n for n, _, _ in steps]


@pytest.mark.parametrize("weight", [0.0, 0.01])
@pytest.mark.parametrize("direction", ["model", "rederived"])
def test_first_order_is_ddim(weight, direction):
    one = made(DPMSolver(order=1, noise_direction=direction), guidance_weight=weight)
    ddim = made(DDIM(noise_direction=direction), guidance_weight=weight)
    torch.testing.assert_close(one, ddim, atol=1e-5, rtol=1e-5)


def test_guidance_reaches_the_sound():
    for solver in SOLVERS.values():
        assert not torch.equal(made(solver), made(solver, guidance_weight=0.01))


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 20])
def test_any_number_of_steps_both_streams(solver, steps):
    out = generate(
        MODEL, shape=(2, 4), num_sample_steps=steps, solver=solver, generator=make_generator(0)
    )
    for stream in (out.video, out.audio):
        assert stream.dtype == torch.float32 and torch.isfinite(stream).all()


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_same_seed_same_sound_and_no_company_matters(solver):
    one = made(solver)
    assert torch.equal(one, made(solver)) and not torch.equal(one, made(solver, seed=1))
    torch.testing.assert_close(made(solver, n=1), one[:1], atol=1e-5, rtol=1e-5)


def test_fresh_noise_comes_from_the_generator():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    a = made(DPMSolver(stochastic=True))
    torch.manual_seed(1)
    assert torch.equal(a, made(DPMSolver(stochastic=True)))
    torch.set_rng_state(before)
    assert not torch.equal(a, made(DPMSolver()))


def test_one_solver_object_can_be_used_twice():
    solver = DPMSolver()
    assert torch.equal(made(solver, steps=6), made(solver, steps=6))
    assert not torch.equal(made(solver, steps=6), made(solver, steps=7))


def test_second_order_needs_fewer_steps():
    fine = made(DPMSolver(), steps=400)

    def error(solver, steps):
        return (made(solver, steps=steps) - fine).abs().mean()

    for solver in (DPMSolver(), UniPC()):
        assert error(solver, 20) < error(DDIM(), 20) / 2


@pytest.mark.parametrize(
    "wrong, text",
    [
        ({"order": 4}, "order must be one of 1, 2, 3"),
        ({"noise_direction": "fresh"}, "noise_direction must be one of 'model', 'rederived'"),
        ({"time_power": 1.0, "guided_times": (1.0, 0.0)}, "guided_times must ascend"),
    ],
)
def test_wrong_settings_are_named(wrong, text):
    with pytest.raises(ValueError, match=text):
        DPMSolver(**wrong)
