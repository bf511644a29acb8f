"""Sweeps: Optuna searches settings, the graph of dvc.yaml says what each of them costs, MLflow shows what came out."""
