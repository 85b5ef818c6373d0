"""The device's side: a small model that reads the private context, and the worker that answers with deltas and nothing else."""
