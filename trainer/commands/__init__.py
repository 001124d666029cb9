"""The command lines `repa-train`, `repa-sample`, `repa-cknna`, and the one door to `repa.pipeline`."""
