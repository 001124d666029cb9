"""What a cache is, holds, costs and whether it is whole: info, verify, recompute, estimate."""
