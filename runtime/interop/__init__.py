"""Bundles inside other libraries' pipelines."""
