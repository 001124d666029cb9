"""`repa-cache derive`: components made from others, and the fits that make them: axes, residuals, statistics."""
