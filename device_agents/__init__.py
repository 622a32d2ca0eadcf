"""What runs on a device: the agent, the measurement and the runtimes; and the protocol.

Imports with nothing but the base install (numpy, pydantic, httpx, psutil, onnxruntime):
torch, ray, optuna, sqlalchemy and fastapi never reach a device.
"""
