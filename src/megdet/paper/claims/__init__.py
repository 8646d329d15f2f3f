"""The paper's claims as experiments: the question, the rows, and the rule of the verdict, fixed before the runs."""
