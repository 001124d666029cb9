"""What every test needs before its first import."""

import os

import torch

# Triton decides at its own import whether kernels are compiled or interpreted. timm, torchvision and torch._dynamo
# import it, so this comes before any of them.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
