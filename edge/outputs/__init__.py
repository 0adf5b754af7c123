"""From logits to labels, and how far two graphs' logits are apart."""
