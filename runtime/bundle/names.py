"""Names of graphs and tensors that hosts know; every other name is the bundle's own (docs/bundle.md)."""

UPDATE = "step"  # the graph that moves the latent
NEXT = "next_"  # before the name of a buffer: its value for the step after
DEVIATION = "deviation_"  # before a coarse patch
TABLES = ("rope_cos", "rope_sin")  # the levels' rotary positions
LATENT, IMAGE, IDS, GUIDANCE = "latent", "image", "input_ids", "guidance"

# what a session tells a step of every sample, each (B,)
TIMESTEP, DT, KEEP_ESTIMATE = "timestep", "dt", "keep_estimate"
CARRY = "carry"  # the same, (B, number of coarse levels); only where there are coarse levels
