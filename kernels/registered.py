"""The alignment loss as an operator of torch's: what torch.compile and export keep whole, and what CUDA tensors call.

In a module of its own because registering costs a start 0.2 s and 70 MB (torch looks for Triton to do it), and the
first call 1.8 s and 150 MB (torch imports its compiler): an eager run on the CPU needs neither.
"""

import functools

import torch

from .gradient import backward, loss_and_dz, save

# torch searches the source of an op for Triton kernels, and to read it imports its compiler; ours are imported inside,
# where it does not look. A partial has no source, and lacks of a function only what is set here.
_unsearched = functools.partial(loss_and_dz)
vars(_unsearched)["__globals__"] = {}
cosine_alignment = torch.library.triton_op("repa::cosine_alignment", _unsearched, mutates_args={})
torch.library.register_autograd("repa::cosine_alignment", backward, setup_context=save)
