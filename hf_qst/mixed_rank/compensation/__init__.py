"""Stage 3: factors that make up for the errors of the layers before them, and their training.

A layer behind compressed ones no longer sees the inputs X it was made for but others, Z. Both closed form and descent ask
of its factors what the dense layer gave for X, from what they are given, Z. Fitting the same rank to the same inputs
again could not gain anything: the stage-1 factors are already the best of their rank there.
"""

from hf_qst.mixed_rank.compensation.gradient import ProxyRows, gradient_factors
from hf_qst.mixed_rank.compensation.least_squares import bias_shift, least_squares_factors

__all__ = ["ProxyRows", "bias_shift", "gradient_factors", "least_squares_factors"]
