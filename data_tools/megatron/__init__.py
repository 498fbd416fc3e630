"""Megatron-LM's indexed datasets (.bin and .idx): to token stores and back."""
