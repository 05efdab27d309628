"""From a file of conversations to batches: schema -> encode -> dataset -> collate."""
