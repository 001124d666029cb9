"""What is trained: SiT, projectors, EMA; and what is left of them: checkpoints, ours and published."""
