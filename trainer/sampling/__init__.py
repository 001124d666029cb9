"""Noise to pictures: samplers, single batches, files of samples."""
