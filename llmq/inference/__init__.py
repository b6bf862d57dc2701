"""Making a loaded model decode faster on a CPU. Nothing here changes a checkpoint, and a model that
went through it is for running, not for saving.

fuse.py    layers that read the same input become one product (q/k/v, gate/up)
cache.py   keys and values in place instead of copied for every token
step.py    a decoding step as one list of kernel calls
head.py    the output head and the embeddings at 8 or 4 bits
"""
