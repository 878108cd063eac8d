"""DAVIS-2017: labels of the first frame carried through a video by nearest frozen features."""
