"""A server under mixed load for a long time: what it must not lose, grow or slow down. See ``__main__``."""
