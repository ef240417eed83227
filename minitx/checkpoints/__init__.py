"""Foreign formats: the only place that knows other projects' names and layouts."""
