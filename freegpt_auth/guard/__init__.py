"""The path of one request: credentials in, a caller or a refusal out. Depends on no engine of tokens."""
