"""Signatures and keystreams."""
