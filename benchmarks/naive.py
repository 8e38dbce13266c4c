"""The same network, built as one would at first: what `speed.py` measures the real one against.

Same weights and same function (equal outputs are asserted), but every frame is NCHW memory, each
change of view is a rearranged copy, the temporal convolution is a `conv1d` over (b h w) rows,
attention writes its softmax out, the fusion concatenates before its linear layer, and every
operation writes to new memory.
"""

import copy

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from cmmd.blocks import (
    AudioConv,
    AudioResBlock,
    ResBlock,
    SpatialAttention,
    SpatialConv,
    TemporalConv,
    VideoResBlock,
    modulate,
)
from cmmd.fusion import EasyFusion, audio_for_frames, video_for_columns
from cmmd.unet import CMMDUNet


class NaiveSpatialConv(SpatialConv):
    "A k x k convolution of a copied stack of images."

    def forward(self, video: Tensor) -> Tensor:
        images = rearrange(video, "b f c h w -> (b f) c h w").contiguous()
        return rearrange(nn.Conv2d.forward(self, images), "(b f) c h w -> b f c h w", b=len(video))


class NaiveTemporalConv(TemporalConv):
    "A `conv1d` over copied rows of frames, one row per pixel."

    def forward(self, video: Tensor) -> Tensor:
        h, w = video.shape[-2:]
        rows = rearrange(video, "b f c h w -> (b h w) c f").contiguous()
        rows = F.conv1d(rows, self.weight[..., 0], self.bias, padding=self.padding[0])
        return rearrange(rows, "(b h w) c f -> b f c h w", h=h, w=w).contiguous()


class NaiveAudioConv(AudioConv):
    "A plain `Conv1d`."

    def forward(self, audio: Tensor) -> Tensor:
        return nn.Conv1d.forward(self, audio.contiguous())


class NaiveResBlock(ResBlock):
    "The block as it is written down, a new tensor for every operation."

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(F.silu(modulate(self.norm1(x), self.time1(time), self.axes)))
        h = self.conv2(F.silu(modulate(self.norm2(h), self.time2(time), self.axes)))
        return self.skip(x) + h


def naive_attend(qkv: Tensor, head_dim: int) -> Tensor:
    "Self-attention over (n, places, 3c) with its softmax written out."
    q, k, v = rearrange(qkv, "n i (three heads d) -> three n heads i d", three=3, d=head_dim)
    weights = torch.softmax(q @ k.transpose(-1, -2) / head_dim**0.5, -1)
    return rearrange(weights @ v, "n heads i d -> n i (heads d)")


class NaiveSpatialAttention(SpatialAttention):
    "Attention over copied lists of pixels."

    def forward(self, video: Tensor) -> Tensor:
        b, _, _, h, w = video.shape
        pixels = rearrange(self.norm(video), "b f c h w -> (b f) (h w) c").contiguous()
        out = self.out(naive_attend(self.qkv(pixels), self.head_dim))
        return video + rearrange(out, "(b f) (h w) c -> b f c h w", b=b, h=h, w=w)


def both_qkv(own: Tensor, other: Tensor, first: nn.Linear, second: nn.Linear) -> Tensor:
    "One linear layer over [own; other], concatenated (Eq. 7 as it is written)."
    weight = torch.cat([first.weight, second.weight], 1)
    return F.linear(torch.cat([own, other], -1), weight, first.bias)


class NaiveEasyFusion(EasyFusion):
    "Easy fusion with a concatenation for each pixel of each frame."

    def forward(
        self, video: Tensor, audio: Tensor, columns_per_frame: float | None = None
    ) -> tuple[Tensor, Tensor]:
        (b, f, _, h, w), ratio = video.shape, columns_per_frame
        heard = audio_for_frames(self.norm_audio(audio), f, ratio)
        seen = self.norm_seen(video_for_columns(video, audio.shape[-1], ratio))
        rows = rearrange(self.norm_video(video), "b f c h w -> (b h w) f c").contiguous()
        heard = repeat(heard, "b f c -> (b h w) f c", h=h, w=w)
        qkv = both_qkv(rows, heard, self.video_qkv, self.video_from_audio)
        out = self.video_out(naive_attend(qkv, self.head_dim))
        video = video + rearrange(out, "(b h w) f c -> b f c h w", b=b, h=h, w=w)
        columns = self.norm_audio(audio).transpose(1, 2).contiguous()
        qkv = both_qkv(columns, seen, self.audio_qkv, self.audio_from_video)
        return video, audio + self.audio_out(naive_attend(qkv, self.head_dim)).transpose(1, 2)


NAIVE = {
    VideoResBlock: NaiveResBlock,
    AudioResBlock: NaiveResBlock,
    SpatialConv: NaiveSpatialConv,
    TemporalConv: NaiveTemporalConv,
    AudioConv: NaiveAudioConv,
    SpatialAttention: NaiveSpatialAttention,
    EasyFusion: NaiveEasyFusion,
}


def naive_build(model: CMMDUNet) -> CMMDUNet:
    "A copy of the network with the same weights and every layer replaced by its naive form."
    model = copy.deepcopy(model)
    for module in model.modules():
        module.__class__ = NAIVE.get(type(module), type(module))
    return model
