"""What the GPU backends share: memory, a stream, and the buffers of a run."""
