"""Images in: where they come from (sources), how they are read (decode), cut and batched.

Nothing here knows a method. `open_source` / `open_split` turn a path into a map-style source;
`loader.pretrain_batches` and `centre.eval_batches` turn a source into batches of uint8 tensors.
"""
