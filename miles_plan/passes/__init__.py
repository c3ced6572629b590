"""One file a pass; pipeline.py is the only place of order."""
