"""CoSteer for vLLM: a private context on the user's device steers a large model in a data centre, token by token."""

__version__ = "0.1.0"
