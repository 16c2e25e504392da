"""From class labels to images."""
