"""Names of graphs and tensors that hosts know; every other name is the bundle's own (docs/spec/bundle.md)."""

UPDATE = "step"  # the graph that moves the latent
GUIDE = "guide"  # the graph that puts the two passes of guidance together
PREDICT = "predict"  # the graph that gives a velocity where no level runs
GATE_INPUT = "gate_input"  # of a gate graph: the first block's modulated input at the step before, (B, H/p, W/p, …)
GATE_CHANGES = ("gate_change", "gate_change_low", "gate_change_high")  # what it gives, each (B,)
GATE_TIMESTEP = "gate_timestep"  # the buffer that it reads its timestep from
GROW = "grow"  # the graph that makes a small latent a larger one
CONDITIONAL, UNCONDITIONAL = "velocity_conditional", "velocity_unconditional"  # what the guide graph takes
NEGATIVE = "negative_"  # before the name of an input that text feeds: what the other prompt becomes
NEXT = "next_"  # before the name of a buffer: its value for the step after
DEVIATION = "deviation_"  # before a coarse patch
PREDICTION_ERROR = "prediction_error"
VELOCITIES = "velocities"  # of the last computed steps, (B, how many are kept, …), the newest first
TABLES = ("rope_cos", "rope_sin")  # the levels' rotary positions
# the grow graph's (ddit.runtime.samplers.growing)
GROWING_TABLES = ("dct_small_height", "dct_small_width", "dct_height", "dct_width", "fresh")
NOISE, GAIN = "noise", "gain"
LATENT, IMAGE, IDS, GUIDANCE, VELOCITY = "latent", "image", "input_ids", "guidance", "velocity"
LATENT_FRAME, FRAMES = "latent_frame", "frames"  # what a video decoder takes and gives

# what a session tells a step of every sample, each (B,)
TIMESTEP, DT, CORRECTION = "timestep", "dt", "correction"
MODEL_TIMESTEP = "model_timestep"  # the buffer that the levels read their timestep from, as the model knows it
ESTIMATES = "estimates"  # of the clean latent in the steps before, which a multistep solver keeps, newest first
SOLVER = "solver"  # coefficients of a multistep solver, in place of dt, (B, order + 1)
KEEP_ESTIMATE, KEEP_VELOCITY = "keep_estimate", "keep_velocity"
PREDICTION = "prediction"  # weights of the kept velocities, (B, how many are kept)
CARRY = "carry"  # the same, (B, number of coarse levels); only where there are coarse levels

# after the name of a weight (K, N): the tensors (N, K) and (N) that stand for it in a file of FP8 weights
FP8, FP8_SCALE = ".fp8", ".fp8_scale"
