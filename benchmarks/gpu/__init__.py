"""Everything that needs a GPU, in stages: ``python -m benchmarks.gpu --help``, or ``make gpu``."""
