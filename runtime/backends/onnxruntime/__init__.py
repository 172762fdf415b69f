"""ONNX Runtime, on host arrays and on buffers of a GPU."""
