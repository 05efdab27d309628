"""What a user writes, command line or file, to flags with values. Imports nothing heavy."""
