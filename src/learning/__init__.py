"""Tasks, DP-SGD, evaluation and baselines: the only room that imports torch."""
