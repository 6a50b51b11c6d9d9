"""Which architectures are fused, and exact: `python -m tests.survey`."""
