"""Compare an exported folder with what it was made from."""
