"""From a checkpoint's parameters to text."""

from sparse_lm.decoding.decoder import Decoder as Decoder
from sparse_lm.decoding.samplers import Greedy as Greedy
from sparse_lm.decoding.samplers import Sampler as Sampler
from sparse_lm.decoding.samplers import make_sampler as make_sampler
from sparse_lm.decoding.text import stream_text as stream_text
