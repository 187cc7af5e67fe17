"""MoE-Tuning: recipes, which parameters learn in each stage, the trainer, the run."""
