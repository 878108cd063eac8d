"""Pre-training: settings of a run, the parts it is built of, its step."""
