"""The vision-language model: checkpoints, prompts, pixels and answers, on the stock Hugging Face classes."""
