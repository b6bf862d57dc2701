"""GGUF, the file of llama.cpp: a container, blocks, and the names and settings of the families that
are written and read. `README.md` of `llmq/formats/` says what was learned."""
