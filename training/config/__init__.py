"""From a command line or a file of flags to ``RunArguments``. Imports nothing heavy."""
