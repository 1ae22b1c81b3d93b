"""Graphs of our own, of ONNX's operators: what the targets onnx and openvino share, and mode `fast` reads."""
