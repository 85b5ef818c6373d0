"""``costeer bench``: steering against plain vLLM and against the paper's serial loop, on this machine, in one run."""
