"""What a cache tells of its encoders: spatial metrics, probes, CKNNA, correlation with quality, pictures."""
