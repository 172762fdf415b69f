"""Noise levels and starting noise."""
