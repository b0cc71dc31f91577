"""Built-in language tasks: a small GPT and LoRA fine-tuning. Only the registry names them."""
