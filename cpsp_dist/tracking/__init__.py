"""Runs in MLflow: what is written during a run, and the comparison read back from it.

What knows of experiments, runs and sweeps belongs here; the only package that imports mlflow.
"""
