"""Usage of tokens, whatever the engine: the contract of a usage store, and the recorder that writes to one."""
