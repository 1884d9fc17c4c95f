"""Tasks of `benchmarks/langevin_tasks.py`: one file a kind of training, each with its methods, settings and metrics."""
