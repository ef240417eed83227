"""Everything that measures: benchmarks, comparisons, checks against reference outputs."""
