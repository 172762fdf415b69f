"""A whole bundle as one ONNX model: token ids and noise in, a picture out."""
