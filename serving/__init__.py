"""Answers to requests: one engine over a loaded model, and the server, chat and batches of prompts on top of it."""
