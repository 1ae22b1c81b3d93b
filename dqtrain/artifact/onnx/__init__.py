"""The graphs of `graphs.family` for ONNX Runtime, with weights in blocks of codes."""
