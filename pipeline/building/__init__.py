"""`repa-cache build`: the plan, the ranges still to do, and the Ray job that encodes them."""
