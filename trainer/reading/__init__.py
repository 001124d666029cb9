"""Which rows a step sees, read ahead of it: components, reader, order, batches, prefetch, staging."""
