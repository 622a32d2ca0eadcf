"""Driving a running service from Python."""
