"""Rows to bytes on disk: shards, records of what is done, metadata, statistics, quantisation. Killable any time."""
