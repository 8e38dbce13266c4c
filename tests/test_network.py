"""What makes the network fast keeps its numbers, and nothing in a step waits for the host."""

import importlib.util
import sys

import pytest
import torch
from project import ROOT
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from cmmd.blocks import FrameNorm, SpatialConv, TemporalConv, VideoResBlock, channels_last
from cmmd.core import make_generator
from cmmd.guidance import generate, guided_step, predict, sampling_steps, step_amplitudes
from cmmd.unet import CMMDUNet, UNetConfig

CAPTURABLE = ("easy", "none", "cross_attention")  # "window" reads how long its windows are
LAYERS = (SpatialConv, TemporalConv, FrameNorm)


def awake(**changes):
    "A tiny network in which no layer is at zero."
    torch.manual_seed(0)
    model = CMMDUNet(UNetConfig.tiny(**changes)).eval()
    for p in model.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.05)
    return model


def inputs(b=1, f=18):
    g = make_generator(b, f)
    video = torch.randn(b, f, 4, 8, 8, generator=g)
    audio = torch.randn(b, 80, round(6.25 * f), generator=g)
    return video, audio, torch.randint(0, 1000, (b,), generator=g)


def naive_build(model):
    spec = importlib.util.spec_from_file_location("naive", ROOT / "benchmarks" / "naive.py")
    module = sys.modules.setdefault("naive", importlib.util.module_from_spec(spec))
    if not hasattr(module, "naive_build"):
        spec.loader.exec_module(module)
    return module.naive_build(model)


def sound_gradient(model, video, audio, t):
    audio = audio.clone().requires_grad_()
    return torch.autograd.grad(model(video, audio, t)[0].square().sum(), audio)[0]


# ---- the same function, by the shorter way
@pytest.mark.parametrize("shape", [(1, 18), (2, 18), (1, 7)], ids=str)
def test_the_naive_build_answers_the_same(shape):
    model, x = awake(), inputs(*shape)
    naive = naive_build(model)
    assert naive.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        for ours, theirs in zip(model(*x), naive(*x)):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    ours, theirs = sound_gradient(model, *x), sound_gradient(naive, *x)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * ours.abs().max().item())


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("mode", ["no gradient", "frozen, gradient of the sound", "learning"])
def test_video_layers_keep_channels_last_memory(batch, mode):
    "At every batch size and in every use: a layer that does not makes copies, silently."
    model, x, lost = awake(), inputs(batch), []

    def look(layer, _, out):
        if not out.permute(0, 1, 3, 4, 2).is_contiguous():
            lost.append(layer)

    for layer in model.modules():
        if isinstance(layer, LAYERS):
            layer.register_forward_hook(look)
    if mode == "no gradient":
        with torch.no_grad():
            model(*x)
    elif mode == "learning":
        sum(y.square().mean() for y in model(*x)).backward()
    else:
        sound_gradient(model.requires_grad_(False), *x)
    assert lost == []


@pytest.mark.parametrize("batch", [1, 2])
def test_a_block_leaves_its_input_alone_and_gives_the_same_numbers_without_a_gradient(batch):
    torch.manual_seed(0)
    block = VideoResBlock(8, 16, 32)
    for p in block.parameters():
        nn.init.normal_(p, std=0.2)
    x, time = channels_last(torch.randn(batch, 5, 8, 4, 4)), torch.randn(batch, 32)
    kept = x.clone()
    with torch.no_grad():
        out = block(x, time)
    assert torch.equal(x, kept) and torch.equal(out, block(x.requires_grad_(), time).detach())


def test_a_frozen_norm_and_a_learning_one_have_gradients():
    "The way around torch's crash stays where weights learn, and only there."
    x = channels_last(torch.randn(2, 3, 8, 4, 4))
    norm = FrameNorm(8)
    norm(x).square().sum().backward()
    assert norm.norm.weight.grad.abs().sum() > 0
    frozen, there = FrameNorm(8).requires_grad_(False), x.clone().requires_grad_()
    frozen(there).square().sum().backward()
    assert there.grad.isfinite().all() and not frozen(x).requires_grad


def test_weights_may_be_kept_channels_last(tmp_path):
    "Bit for bit the same answer, and they can be saved."
    model, x = awake(), inputs()
    with torch.no_grad():
        plain = model(*x)
        ready = model.to(memory_format=torch.channels_last)
        assert all(torch.equal(a, b) for a, b in zip(plain, ready(*x)))
    ready.save_pretrained(tmp_path)
    again = CMMDUNet.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[name], value) for name, value in ready.state_dict().items())


def test_the_papers_network_stays_below_its_operations():
    with torch.device("meta"):
        model = CMMDUNet(UNetConfig.paper())
        x = torch.empty(1, 18, 4, 64, 64), torch.empty(1, 80, 112), torch.zeros(1).long()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*x)
    assert 0.5e12 < counter.get_total_flops() < 0.58e12


# ---- a step that can be recorded
class NothingForTheHost(TorchDispatchMode):
    "Refuses to read a value, to draw a number, and to move one between host and device."

    READS = {"_local_scalar_dense", "item", "nonzero", "equal", "masked_select", "unique"}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.READS or torch.Tag.nondeterministic_seeded in func.tags:
            raise AssertionError(f"{func} in a step")
        moves = name in ("_to_copy", "copy_")  # elsewhere the host may lend a single number
        before = {
            x.device for x in tree_leaves(args) if isinstance(x, torch.Tensor) and (x.ndim or moves)
        }
        out = func(*args, **(kwargs or {}))
        after = {x.device for x in tree_leaves(out) if isinstance(x, torch.Tensor)}
        if len(before | after) > 1:
            raise AssertionError(f"{func} moves from {before} to {after}")
        return out


def blind_step(fusion, side):
    "A guided step on tensors without numbers: what reads one, fails."
    with torch.device("meta"):
        model = CMMDUNet(UNetConfig.tiny(fusion=fusion))
        video, audio = torch.empty(1, 18, 4, 8, 8), torch.empty(1, 80, 112)
        levels, t = torch.empty(2, 2, 2), torch.empty(1, dtype=torch.int64)
    given = [video, audio] if side == "video" else [audio, video]
    with NothingForTheHost(), torch.no_grad():
        return guided_step(
            model,
            given[1],
            t,
            levels=levels,
            target=("audio", "video").index(side),
            condition=given[0],
            noise=torch.empty_like(given[0]),
            guidance_weight=8.0,
        )


@pytest.mark.parametrize("side", ["video", "audio"])
@pytest.mark.parametrize("fusion", ["easy", "cross_attention"])
def test_nothing_in_a_guided_step_waits_for_the_host(fusion, side):
    "Without a GPU: on tensors without values, of which nothing can be read."
    made = blind_step(fusion, side)
    assert made.device.type == "meta"
    assert made.shape == ((1, 80, 112) if side == "video" else (1, 18, 4, 8, 8))


def test_the_test_of_a_step_notices_what_waits():
    model, x = awake(), inputs()
    with NothingForTheHost(), pytest.raises(AssertionError, match="in a step"):
        predict(model, x[:2], 500, sampling_steps(model, 4)[0][1])
    with NothingForTheHost():
        x = torch.zeros(3, device="meta")
        for waits in (
            lambda: x.sum().item(),
            lambda: torch.tensor(1.0).to(x),
            lambda: torch.randn_like(x),
        ):
            with pytest.raises(AssertionError):
                waits()
        with pytest.raises((AssertionError, RuntimeError)):
            bool(x.isfinite().all())


@pytest.mark.parametrize("side", ["video", "audio"])
def test_recordable_steps_are_the_steps_of_generate(side):
    "Bit for bit, in both directions."
    model, (video, audio, _) = awake(), inputs(2)
    given = {"video": video, "audio": audio}[side]
    made = generate(
        model,
        **{side: given},
        guidance_weight=0.5,
        num_sample_steps=4,
        generator=make_generator(1),
    )
    g = make_generator(1)
    noise = [torch.randn(x.shape, generator=g) for x in (video, audio)]
    target = ("audio", "video").index(side)
    z, steps = noise[target], sampling_steps(model, 4)
    for (n, *_), levels in zip(steps, step_amplitudes(steps, z)):
        z = guided_step(
            model,
            z,
            torch.full((2,), n),
            levels=levels,
            target=target,
            condition=given,
            noise=noise[1 - target],
            guidance_weight=0.5,
        )
    assert torch.equal(z, made.audio if target else made.video)


@pytest.mark.parametrize("fusion", CAPTURABLE)
def test_the_network_is_one_graph_for_torch_compile(fusion):
    "No break between its first line and its last, and the same bits on the eager backend."
    model, x = awake(fusion=fusion), inputs()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(model(*x), compiled(*x)))
