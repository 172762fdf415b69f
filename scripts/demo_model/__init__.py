"""The demo model: its parts, the scenes it learns to draw, and the classifier that judges its pictures."""
