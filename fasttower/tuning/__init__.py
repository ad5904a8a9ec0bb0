"""Tuning: a longer search, over more settings than the one in each training, with optuna."""
