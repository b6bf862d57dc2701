"""The card of a result: what a README.md says of a quantized model, made of what is known of it and
of nothing else; and how a result with its card gets onto the Hub."""
