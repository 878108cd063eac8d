"""Limits that more than one rule of the doctor goes by."""

FEW_STEPS = 100
"""Healthy small runs spend about so many on predicting the mean (benchmarks/sick_runs.py)."""
FEW_IMAGES = 1000
"""Below, a run learns them by heart: its loss falls and its k-NN does not rise."""
FAR = 2.0
"""Mean of normalised pixels, in standard deviations; a right one is 0 +- 0.5."""
UNIFORM = 0.99
"""Entropy of the class token's attention, 1 = uniform. Measured on Imagenette (docs/results/doctor.md): DeiT-Tiny
and the embedded teacher lie below, networks of random weights above."""
GREEDY = 0.95
"""Attention that goes to the class token itself and to other prefix tokens."""
SAME = 0.05
"""Share of a map's or of features' variance that images, not places, make."""
