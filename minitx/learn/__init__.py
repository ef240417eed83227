"""The exercises: ``minitx learn``. Each master states a problem, solves it,
and knows the typical mistakes."""
