"""Settings, errors, command line, run directories, files: what every room uses."""
