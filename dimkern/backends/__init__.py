"""The map step (or score and map fused) on each device; every file offers `Tiles` (see `dimkern.streaming`)."""
