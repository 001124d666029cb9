"""`repa-cache derive`: components made from others, and the fits that make them (PCA of tokens)."""
