"""The ranks of a run: launchers, process group, messages between ranks, hang detection, data shared by a host."""
