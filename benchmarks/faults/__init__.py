"""The fault campaign: real kills, torn files, full disks, broken data, hostile input."""
