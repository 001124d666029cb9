"""How good samples are while training: Frechet distances, reference statistics, grids."""
