"""What the networks of a run, or any backbone, make of images: maps, masks, features, predictions as arrays.

Here networks run and nothing is drawn; the pictures are in report/.
"""
