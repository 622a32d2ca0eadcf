"""Schema changes, run by `storage/schema.py`; each file in `versions` is one step."""
