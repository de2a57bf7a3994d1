"""Measurements of the engine's speed and memory, from a command line. Nothing else imports them."""
