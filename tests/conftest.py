"What every process of the test suite does first."

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a forked child would wait for OpenMP's threads

import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

# PyTorch starts autograd's threads at the first backward pass, one for each device that it knows.
# A FakeTensorMode (cmmd.scale) makes it know a GPU even where there is none, and once a thread is
# started no forked child may compute a gradient; many tests fork one. So the first pass is here.
torch.ones(1, requires_grad=True).sum().backward()

# The same examples in every run, so that a change is judged by what it changes. Now and then, look
# further: pytest --hypothesis-profile random
settings.register_profile("same", derandomize=True)
settings.register_profile("random", derandomize=False)
settings.load_profile("same")
