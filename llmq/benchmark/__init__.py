"""Timing of kernels and of decoding, for `llmq bench` and the scripts."""
