"""The commands of ddit-run, one a module."""
