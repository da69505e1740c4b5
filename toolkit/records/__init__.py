"""The run directory: what a run writes down, and how it is read back. Without torch."""
