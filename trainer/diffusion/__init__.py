"""The mathematics of a step: path and velocity, latents and model input, the two losses."""
