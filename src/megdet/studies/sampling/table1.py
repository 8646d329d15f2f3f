"""Table 1 of the paper as printed: the ratio of positive samples in percent, by epoch and mini-batch size."""

TABLE1 = {(1, 16): 5.58, (1, 256): 9.82, (6, 16): 11.77, (6, 256): 16.11, (12, 16): 16.59, (12, 256): 16.91}
