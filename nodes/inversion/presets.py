"""Names of the presets that the nodes of KV Inversion share: its paper says two things of one procedure."""

# arXiv:2309.16608 sets guidance 7.5 in all three stages of Algorithm 1; its equation 4 holds one conditional eps, which
# is guidance 1.
ALGORITHM_1 = "paper, Algorithm 1"
EQUATION_4 = "paper, equation 4 as printed"
