"""What the network computes."""

from sparse_lm.model.transformer import Transformer as Transformer
