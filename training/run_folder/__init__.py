"""The folder of a run: what may be written and removed there, its checkpoints, and how a run resumes from it."""
