"""What the levels are told beside the latent: text, positions, guidance."""
