"""What only has to work. No first reading opens this folder; each file knows one thing.

answers      are two answers equal? Numbers, and what surrounds LaTeX
judge        the process that compares LaTeX, and can be killed
files, rows  files, folders and the hub -> rows -> questions
attention    how a Hugging Face model reads a table of slots
slots        the engine's state: one line of numbers a slot
graphs       CUDA graphs of a decode step
fast         a decode step compiled, on a card, where it is asked for
nucleus      top-p without sorting the vocabulary
stops        what ends a response
steps        where sentences end and formulas are (VinePPO on MATH)
logprobs     log-probs of tokens without a vocabulary-wide tensor
batches      micro-batches of like length, a prompt once for all its responses
tiny         the tiny model's shape and tokenizer
memory       devices, what fits, passes made again in halves
processes    torchrun, FSDP
checkpoint   files that survive a kill
report       tables, pictures, the log
commands     flags, one-line errors, signals, progress bars
checks       settings that make no sense
"""
