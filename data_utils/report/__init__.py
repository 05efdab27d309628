"""The data report of a run: what became of every record, as figures, text for a terminal, and a page."""
