"A clip through a VAE: any number of frames at a time, and no GPU but the one that is asked."

import pytest
import torch

from cmmd import latents
from cmmd.latents import (
    VAETrainConfig,
    decode_video,
    encode_video,
    frames_at_once,
    load_vae,
    train_vae,
)
from cmmd.train import make_accelerator


@pytest.fixture(scope="module")
def vae():
    return load_vae("tiny")


def frames(n, size):
    g = torch.Generator().manual_seed(n)
    return torch.randint(0, 256, (1, n, size, size, 3), generator=g, dtype=torch.uint8)


def test_a_group_of_frames_holds_no_more_pixels_than_64_of_128():
    assert frames_at_once(128, 128) == frames_at_once(64, 64) == frames_at_once(1, 1) == 64
    assert frames_at_once(512, 512) == 4 and frames_at_once(4096, 4096) == 1
    for height, width in ((144, 256), (720, 1280), (1080, 1920), (130, 126)):
        n = frames_at_once(height, width)
        assert n == 1 or n * height * width <= 64 * 128**2 < (n + 1) * height * width


@pytest.mark.parametrize("size, groups", [(64, [64, 6]), (128, [64, 6]), (256, [16] * 4 + [6])])
def test_frames_go_through_a_vae_in_such_groups(vae, monkeypatch, size, groups):
    "As before up to 128 x 128; the VAE itself is left out here."
    seen = []

    def encode(vae, part):
        seen.append(len(part))
        return torch.zeros(len(part), 4, size // 8, size // 8)

    def decode(part):
        seen.append(len(part))
        return type("Answer", (), {"sample": torch.zeros(len(part), 3, size, size)})

    monkeypatch.setattr(latents, "_encode_frames", encode)
    monkeypatch.setattr(vae, "decode", decode)
    z = encode_video(vae, torch.zeros(1, sum(groups), size, size, 3, dtype=torch.uint8))
    assert seen == groups
    assert decode_video(vae, z).shape == (1, sum(groups), size, size, 3) and seen == 2 * groups


@pytest.mark.parametrize("size", [64, 128, 256])
def test_the_number_of_frames_at_a_time_changes_nothing_but_rounding(vae, size):
    video = frames(6, size)
    z = encode_video(vae, video)
    back = decode_video(vae, z).int()
    assert torch.equal(encode_video(vae, video, batch_size=64), z)
    assert torch.equal(decode_video(vae, z, batch_size=64).int(), back)
    for n in (1, 4, 5):
        torch.testing.assert_close(encode_video(vae, video, batch_size=n), z, rtol=0, atol=1e-4)
        apart = (decode_video(vae, z, batch_size=n).int() - back).abs()
        assert apart.max() <= 1 and (apart > 0).float().mean() < 1e-3


def test_training_a_vae_looks_at_no_gpu_and_draws_nothing_of_others(tmp_path, monkeypatch):
    "Reading each GPU's random state would initialise all of them, seeding one would change it."
    before = torch.get_rng_state()
    made = latents._start_vae(VAETrainConfig(seed=5), None, torch.device("cpu"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        true = latents.tiny_vae(VAETrainConfig().channels)
    for a, b in zip(made.parameters(), true.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(torch.get_rng_state(), before)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in ("get_rng_state", "set_rng_state", "manual_seed", "manual_seed_all"):
        monkeypatch.setattr(torch.cuda, name, None)  # it must not be asked
    make_accelerator("cpu", "no")  # as a run before it did, in another precision
    train_vae(tmp_path, VAETrainConfig(steps=1, batch_size=2), device="cpu", progress=False)


def test_an_unknown_precision_is_refused(tmp_path):
    with pytest.raises(ValueError, match="mixed_precision must be one of 'bf16', 'no'; got 'fp16'"):
        train_vae(tmp_path, VAETrainConfig(mixed_precision="fp16"), device="cpu")
