"""TensorRT: building a graph's engine on the machine that will run it, keeping it in the bundle, running it."""
