"""From a torch module to an ONNX graph whose weights lie once in the bundle's files."""
