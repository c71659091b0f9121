"""Usage of tokens, independent of the engine: the contract of a usage store, and the recorder that writes to one."""
