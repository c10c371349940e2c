"""Gale: an inference server for Gated Linear Attention language models."""

__version__ = "0.1.0"
