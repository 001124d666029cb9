"""What a worker takes of its machine where nobody says: threads, and images a forward pass."""

import torch

GPU_THREADS = 4  # of torch, a worker with a GPU: it flips and checks little, and the decoders want the cores
CPU_IMAGES = 32
FEWEST, MOST = 8, 128  # images a forward pass on a GPU; above, nothing is gained
# Twice what the SD VAE takes for each in float32 (129 MiB, from the allocator's peaks for 4 and 8); a ViT-B takes 7.
IMAGE_BYTES, AT_RESOLUTION = 2**28, 256


def images_a_pass(device: str, resolution: int, *, share: float = 1.0) -> int:
    """Return how many images a forward pass takes on `device`, of which this worker has a `share`.

    By all of a GPU's memory, half of it for activations, not by what is free: a build that goes on later on such a GPU
    has the same sub-batches, and so the same bytes.
    """
    if device == "cpu":
        return CPU_IMAGES
    memory = share * torch.cuda.get_device_properties(torch.device(device)).total_memory
    fitting = int(memory / 2 / (IMAGE_BYTES * (resolution / AT_RESOLUTION) ** 2))
    return min(max(1 << max(0, fitting.bit_length() - 1), FEWEST), MOST)
