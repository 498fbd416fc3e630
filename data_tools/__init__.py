"""Raw text -> tokenizer and token store. Never imports torch."""
