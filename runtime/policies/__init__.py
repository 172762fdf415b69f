"""What decides the level of every denoising step."""
