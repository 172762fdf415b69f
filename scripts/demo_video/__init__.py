"""Training the video demo: clips with captions, a small Wan pipeline, its stages, what they leave behind."""
