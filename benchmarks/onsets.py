"""Onset times of a waveform to about a millisecond, for questions that ask for 10 ms.

`cmmd.sync.detect_onsets` looks at mel columns that are 16 ms apart and 32 ms long; it places an
onset between them, but two sounds within 50 ms are one to it, and a quiet one under a long tail
moves its centre. Here columns are 1 ms apart and 8 ms long.
"""

import librosa
import numpy as np
import torch
from torch import Tensor

WINDOW, BANDS = 0.008, 8  # s; of equal width on the mel scale
BEFORE = 6  # ms: a rise is judged against the loudest of as long a time as the window
FLOOR, DEAD_ZONE = -4.5, 0.3  # bels below the loudest band of the clip; bels


def rises(waveform: Tensor, sample_rate: int) -> np.ndarray:  # (samples,) -> (ms,)
    "How much louder each millisecond is than the time before it, in bels, mean over the bands."
    n, hop = round(WINDOW * sample_rate), sample_rate // 1000
    window = torch.hann_window(n)
    wave = torch.nn.functional.pad(waveform.float(), (n // 2, n // 2))
    power = torch.stft(wave, n, hop, window=window, center=False, return_complex=True).abs() ** 2
    bank = librosa.filters.mel(sr=sample_rate, n_fft=n, n_mels=BANDS, htk=True, norm=None)
    bands = torch.from_numpy(bank) @ power
    loud = (bands / bands.max().clamp(min=1e-9)).clamp(min=10**FLOOR).log10().numpy()
    past = np.pad(loud, ((0, 0), (2 * BEFORE, 0)), mode="edge")
    shape = np.lib.stride_tricks.sliding_window_view(past, BEFORE + 1, axis=1)
    before = shape[:, : loud.shape[1]].max(-1)
    return np.maximum(loud - before - DEAD_ZONE, 0).mean(0)


def onset_times(
    waveform: Tensor,  # (samples,) in [-1, 1]
    sample_rate: int,  # Hz
    *,
    threshold: float = 0.15,  # bels, mean over the bands
) -> np.ndarray:  # (n,) s, ascending
    "Peaks of the rise, each placed at the centre of its mass; at least 30 ms apart."
    strength = rises(waveform, sample_rate)
    around = {"pre_max": 20, "post_max": 20, "pre_avg": 40, "post_avg": 40, "wait": 30}
    peaks = librosa.util.peak_pick(np.pad(strength, 1), delta=threshold, **around) - 1
    near = peaks[:, None] + np.arange(-8, 9)
    weight = np.pad(strength, 8)[near + 8]
    return (weight * near).sum(1) / np.maximum(weight.sum(1), 1e-9) / 1000
