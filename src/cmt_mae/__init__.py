"""CMT-MAE: self-supervised pre-training of vision transformers, and an honest number for the result."""
