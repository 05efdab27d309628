"""OpenAI's HTTP interface over an engine."""
