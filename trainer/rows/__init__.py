"""Rows of a cache's shards into a batch's memory: every way to the bytes, from one file to an object store."""
