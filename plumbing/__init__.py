"""What only has to work. No first reading opens this folder; each file knows one thing.

answers      are two answers equal?
rows         files, folders and the hub -> rows -> questions
attention    how a Hugging Face model reads a table of slots; CUDA graphs
logprobs     log-probs of tokens without a vocabulary-wide tensor
memory       devices, what fits, passes made again in halves
processes    torchrun, FSDP
checkpoint   files that survive a kill
report       tables, pictures, the log
commands     flags, one-line errors, signals, progress bars
"""
