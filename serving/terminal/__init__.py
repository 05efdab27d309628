"""The terminal chat: a conversation with the engine, its commands, and the screens that show them."""
