"""The paper's network as the scripts of speed measure it: awake weights, one clip of noise."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cmmd.core import ClipSpec, make_generator
from cmmd.scale import forward_flops
from cmmd.unet import CMMDUNet, UNetConfig


def awake(config: UNetConfig) -> CMMDUNet:
    "A network with no layer at zero: every path is open."
    torch.manual_seed(0)
    model = CMMDUNet(config).eval().requires_grad_(False)
    for p in model.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.02)
    return model


def awake_paper() -> CMMDUNet:
    "The paper's."
    return awake(UNetConfig.paper())


def paper_inputs(size: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple:
    "One clip of noise: latents 18x4xSxS, mel 80x112, n. Drawn on the CPU, whatever the device."
    g = make_generator(0)
    video = torch.randn(1, 18, 4, size, size, generator=g)
    audio = torch.randn(1, 80, 112, generator=g)
    return video.to(device, dtype), audio.to(device, dtype), torch.tensor([500], device=device)


def sound_gradient(model: Callable, video: Tensor, audio: Tensor, t: Tensor) -> Tensor:
    "What guidance needs: the gradient of the video's estimate with respect to the sound."
    with torch.enable_grad():
        audio = audio.detach().requires_grad_()
        return torch.autograd.grad(model(video, audio, t)[0].square().sum(), audio)[0]


def paper_operations(size: int) -> tuple[int, int]:
    "Parameters, and arithmetic of a forward pass, counted without computing."
    with torch.device("meta"):
        model = CMMDUNet(UNetConfig.paper(clip=ClipSpec(frame_size=8 * size)))
    return sum(p.numel() for p in model.parameters()), forward_flops(model)
