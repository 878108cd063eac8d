"""Commands around runs: look, report, diagnose, bench, ablate, demo."""
