"""What the activations look like, in tables and plots."""
