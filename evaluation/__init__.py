"""Questions of held-out data, the answers of a model to them, and their scores."""
