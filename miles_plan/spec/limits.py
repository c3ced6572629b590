"""Caps on what the loader reads, so that no document takes long or much memory before it is refused."""

MAX_FILE_BYTES = 1 << 20
MAX_DEPTH = 64
MAX_NODES = 100_000  # after aliases are expanded
MAX_FILES = 32  # a spec and all the files its `base:` leads to
MAX_FINDINGS = 100  # a document with more is wrong in one way that repeats
