"""The training methods, one file each, behind one interface for loop, sampler and checkpoint."""
