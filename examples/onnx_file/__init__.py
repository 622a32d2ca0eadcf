"""Tuning a model that exists only as an ONNX file."""
