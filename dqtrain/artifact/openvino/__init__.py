"""The graphs of `graphs.family` for OpenVINO, which reads each weight as a constant of codes."""
