"""Callbacks for `Trainer`, logits processors for `generate`, and the evaluation of code models."""
