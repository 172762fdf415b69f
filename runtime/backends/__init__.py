"""What opens a bundle's graphs and runs them: the CPU, ONNX Runtime on CUDA, TensorRT."""
