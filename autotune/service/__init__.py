"""The HTTP service: user routes, agent routes, and the process that serves them.

Owns translation at the door: bytes to validated messages, records to `api_types`, errors to
problem details. Decisions live in `search/`, rows in `storage/`.
"""
