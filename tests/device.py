"""Where Triton's kernels are tested: on a GPU, else on the CPU in Triton's interpreter."""

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
