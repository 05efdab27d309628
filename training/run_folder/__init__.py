"""Runs that end before their time: checkpoints that prove to be whole, and what goes on from them."""
