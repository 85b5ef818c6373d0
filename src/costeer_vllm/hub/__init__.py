"""The hub: where edge workers and engines meet. It forwards and counts; it needs neither torch nor vLLM nor numpy."""
