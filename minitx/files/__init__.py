"""Foreign formats: the only place that knows other projects' file names, tensor names and layouts."""
