"""`repa-cache import`: latents that others have computed, read as they lie and written as a component."""
