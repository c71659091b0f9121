"""The path of one request: credentials in, a caller or a refusal out. It imports no storage engine."""
