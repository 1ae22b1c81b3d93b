"""The same graphs for OpenVINO."""
