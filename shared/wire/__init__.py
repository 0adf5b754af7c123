"""Bytes between processes: frames, packed messages, tensors."""
