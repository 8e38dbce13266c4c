"""What the tests of training compare two runs by."""

import torch


def weights(*models):
    "All weights of the models in one row."
    return torch.cat([p.detach().flatten() for m in models for p in m.parameters()])


def lines(history):
    "The log without speed and memory, which no two runs share."
    return [{k: v for k, v in m.items() if k not in ("clips_per_s", "memory")} for m in history]


def same(a, b):
    "Whether two results of `train` have equal weights, averages and logs, bit for bit."
    return (
        torch.equal(weights(a.model), weights(b.model))
        and torch.equal(weights(a.ema_model), weights(b.ema_model))
        and lines(a.history) == lines(b.history)
    )
