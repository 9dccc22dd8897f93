"""Runs in MLflow: what is written during a run, and the comparison read back from it.

The only package that imports mlflow.
"""
