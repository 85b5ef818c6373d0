"""How small a delta can be: bytes per token against the KL divergence to the exact policy and against changed greedy tokens."""
