"""The command-line client's parts: they talk HTTP to a gpt-worker anywhere, and import nothing of the service."""
