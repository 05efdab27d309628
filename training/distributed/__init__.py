"""Several processes, perhaps on several hosts: how they find each other, talk, and share a model."""
