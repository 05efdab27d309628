"""What makes a folder open elsewhere: other layouts, its own code, a model card, the proof that it answers alike."""
