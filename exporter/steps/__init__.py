"""The graphs around the transformer's call: what happens to the latent."""
