"""What is handed to `Trainer` and `generate`: callbacks and logits processors of the methods in `hf_qst`.

Side tuning needs none: everything it does happens inside the model.
"""
