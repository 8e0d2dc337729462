"""A PEFT model as pure functions and two dicts of tensors."""
