"""Which settings of a run do not affect its result; apart from settings.py, so that reports need no torch."""

# Settings below these prefixes do not affect results: they may change when a run is continued.
RESUME_SAFE_SETTINGS = (
    "runtime.", "out", "data.path", "data.workers", "data.timeout_s", "data.max_bad", "teacher.cache_folder",
)  # fmt: skip
