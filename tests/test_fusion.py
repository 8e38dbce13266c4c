"""Window fusion: the same as a mask over full attention, at less cost, reproducible, any length."""

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cmmd.blocks import video_tokens
from cmmd.core import make_generator
from cmmd.fusion import FUSIONS, WindowFusion, columns_of_frames, get_fusion, nearest_index
from cmmd.fusion import window_shift
from cmmd.unet import CMMDUNet, UNetConfig

LENGTHS = [(1, 1), (1, 7), (2, 1), (3, 2), (5, 3), (17, 106), (18, 14), (18, 56), (18, 112)]


def wake(module, seed=0):
    "Random weights everywhere, so that no path is closed."
    g = make_generator("wake", seed)
    for p in module.parameters():
        p.data = 0.2 * torch.randn(p.shape, generator=g)
    return module


def streams(n_frames, n_columns, b=3, seed=0):
    g = make_generator("streams", seed)
    video = torch.randn(b, n_frames, 16, 2, 2, generator=g)
    return video, torch.randn(b, 32, n_columns, generator=g)


def masked(fusion, video, audio, ratio=None):
    "What `fusion.other` gives, from full attention of which all but the windows is hidden."
    f, t = video.shape[1], audio.shape[-1]
    shown = nearest_index(t, f, ratio=None if ratio is None else 1 / ratio)
    frames = fusion.windows(audio, f)
    sees = F.one_hot(frames, f).bool().any(2)  # (b, f, f)
    hears = sees[:, :, shown]  # (b, f, t)
    for clip, frame in (~hears.any(-1)).nonzero().tolist():  # no column in it: the one that follows
        after = [j for j in range(t) if shown[j] >= frames[clip, frame, 0]] or [t - 1]
        hears[clip, frame, after[0]] = True

    def ask(q, kv, mask):
        q, k, v = (
            rearrange(x, "b n (h d) -> b h n d", d=fusion.head_dim) for x in (q, *kv.chunk(2, -1))
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])
        return rearrange(out, "b h n d -> b n (h d)")

    pixels, columns = video_tokens(fusion.norm_video(video)), fusion.norm_audio(audio).mT
    seen = fusion.norm_seen(video.mean((-2, -1)))
    hears = repeat(hears, "b f t -> b (f n) t", n=pixels.shape[2])
    heard = ask(fusion.video_q(pixels).flatten(1, 2), fusion.video_kv(columns), hears)
    found = ask(fusion.audio_q(columns), fusion.audio_kv(seen), sees[:, shown])
    return heard.unflatten(1, pixels.shape[1:3]), found


@pytest.mark.parametrize("window", [1, 3, 4, 18, 50])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_gathering_equals_masking(lengths, window):
    fusion, (video, audio) = wake(WindowFusion(16, 32, 8, window=window)), streams(*lengths)
    for ours, full in zip(fusion.other(video, audio, None), masked(fusion, video, audio)):
        torch.testing.assert_close(ours, full, rtol=0, atol=1e-5)
    assert [x.shape for x in fusion(video, audio)] == [video.shape, audio.shape]


def test_the_true_ratio_of_a_deep_level_is_used():
    "106 columns of 17 frames, three levels down: the last small column hangs over the end."
    fusion, (video, audio), ratio = wake(WindowFusion(16, 32, 8)), streams(17, 14), 106 / 8 / 17
    ours = fusion.other(video, audio, ratio)
    for a, b in zip(ours, masked(fusion, video, audio, ratio)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert not torch.equal(ours[1], fusion.other(video, audio, None)[1])


def test_a_window_of_all_frames_is_full_cross_attention():
    window, full = (
        wake(WindowFusion(16, 32, 8, window=18)),
        wake(FUSIONS["cross_attention"](16, 32, 8)),
    )
    for a, b in zip(window(*streams(18, 56)), full(*streams(18, 56))):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_gradient_reaches_both_streams_and_all_weights(lengths):
    fusion, pair = wake(WindowFusion(16, 32, 8)), streams(*lengths)
    for out in (0, 1):
        video, audio = (x.clone().requires_grad_() for x in pair)
        fusion(video, audio)[out].square().sum().backward()
        assert all(x.grad.isfinite().all() and x.grad.abs().max() > 0 for x in (video, audio))
    assert all(p.grad.isfinite().all() for p in fusion.parameters())
    if min(lengths) > 1:
        assert all(p.grad.abs().max() > 0 for p in fusion.parameters())


def test_cost_grows_with_the_window_and_the_clip_not_its_square():
    def work(n_frames, window):
        fusion, pair = WindowFusion(16, 32, 8, window=window), streams(n_frames, 6 * n_frames, b=1)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            fusion.other(*pair, None)
        return counter.get_total_flops()

    assert work(36, 4) == 2 * work(18, 4)
    assert work(18, 4) - work(18, 2) == 2 * (work(18, 2) - work(18, 1))


# ---- the shift
def test_shift_is_of_the_clip_alone_and_takes_every_value():
    audio = torch.randn(3000, 4, 56, generator=make_generator("noise"))
    shifts = window_shift(audio, 15)
    assert torch.equal(
        shifts, torch.cat([window_shift(a[None], 15) for a in audio[:50]] + [shifts[50:]])
    )
    assert torch.bincount(shifts, minlength=15).min() > 140
    assert torch.equal(window_shift(audio, 1), torch.zeros(3000, dtype=torch.int64))
    assert window_shift(torch.full((1, 4, 5), float("nan")), 15).item() in range(15)


def test_shift_needs_no_random_state_and_leaves_it_alone():
    fusion, pair = wake(WindowFusion(16, 32, 8)), streams(18, 56)
    state, outs = torch.get_rng_state(), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        outs.append(fusion(*pair))
    assert all(torch.equal(a, b) for a, b in zip(*outs))
    torch.set_rng_state(state)
    fusion(*pair)
    assert torch.equal(torch.get_rng_state(), state)
    other = streams(18, 56, seed=1)[1]
    assert not torch.equal(fusion.windows(pair[1], 18), fusion.windows(other, 18))


def test_recomputing_a_block_takes_the_same_windows():
    "Gradient checkpointing runs each block twice: the gradients stay the same, bit for bit."
    config = UNetConfig.tiny(
        fusion="window", video_channels=(16, 32), audio_channels=(96, 96), head_dim=16
    )
    model, grads = wake(CMMDUNet(config)), []
    g = make_generator("inputs")
    video, audio = torch.randn(2, 6, 4, 4, 4, generator=g), torch.randn(2, 80, 37, generator=g)
    for again in (False, True):
        (model.enable_gradient_checkpointing if again else model.disable_gradient_checkpointing)()
        model.zero_grad()
        sum(x.square().mean() for x in model(video, audio, torch.tensor([1, 900]))).backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


# ---- lists and errors
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_each_column_belongs_to_one_frame(lengths):
    n_frames, n_columns = lengths
    shown = nearest_index(n_columns, n_frames)
    column, real = columns_of_frames(shown, n_frames)
    assert torch.equal(column[real], torch.arange(n_columns))
    assert torch.equal(shown[column[real]], real.nonzero()[:, 0])
    assert column.min() >= 0 and column.max() < n_columns


def test_errors_name_what_is_allowed():
    with pytest.raises(ValueError, match="'easy', 'none', 'cross_attention', 'window'; got 'hard'"):
        get_fusion("hard")
    with pytest.raises(ValueError, match="window must be from 1"):
        WindowFusion(16, 32, 8, window=0)
    with pytest.raises(ValueError, match="head_dim must divide audio_channels=30"):
        WindowFusion(16, 30, 8)
