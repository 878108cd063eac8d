"""Pictures and pages from tensors, run directories and results; trains nothing."""
