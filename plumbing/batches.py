"""Rollouts to batches that a model reads: a row for a prompt and its responses, rows of like length
together, padded, with a mask of the responses."""

from types import SimpleNamespace

import torch
from torch.nn.utils.rnn import pad_sequence

from plumbing.commands import require
from plumbing.logprobs import no_dropout
from plumbing.memory import halve_until_it_fits, is_out_of_memory
from plumbing.processes import all_shares, rank

# Tokens of a row with several responses: attention computes row * row scores, masked or not.
ROW = 1024


def shared_rows(rollouts, model, limit=ROW):
    """The rows, each a list of indices: neighbours with the same prompt, written once. A row of
    several has at most `limit` tokens. A model that cannot read such gets a row a rollout."""
    rows, room = [], 0
    for i, r in enumerate(rollouts):
        room -= 1 + len(r.response)  # the prompt's last token comes again before each response
        alike = i > 0 and r.prompt == rollouts[i - 1].prompt
        if not (alike and room >= 0 and shares_prompts(model)):
            rows.append([])
            room = limit - len(r.prompt) - len(r.response)
        rows[-1].append(i)
    return rows


def row_length(row, rollouts):
    responses = sum(1 + len(rollouts[i].response) for i in row)
    return len(rollouts[row[0]].prompt) - 1 + responses  # tokens


def microbatches(rollouts, model, tokens_per_microbatch, chosen=None):
    """Indices of the chosen rollouts (None: all) in micro-batches of rows of like length. One has
    at most so many tokens, padding included; a longer row is alone in its own. Longest first: if
    memory runs out, it does so at once.

    Each process takes its share of the rollouts. All get the same number of micro-batches, so the
    last ones may be empty: under FSDP every pass needs all processes."""
    chosen = range(len(rollouts)) if chosen is None else chosen

    def padded(some):  # tokens, in the rows that `padded_batch` will make
        some = [rollouts[i] for i in some]
        lengths = [row_length(row, some) for row in shared_rows(some, model)]
        return len(lengths) * max(lengths)

    shares = []  # the micro-batches of each process
    for share in all_shares(chosen):
        if shares_prompts(model):  # then those of one prompt shall be neighbours
            share = sorted(share, key=lambda i: rollouts[i].prompt)
        rows = shared_rows([rollouts[i] for i in share], model, min(ROW, tokens_per_microbatch))
        rows = [[share[j] for j in row] for row in rows]
        rows.sort(key=lambda row: row_length(row, rollouts), reverse=True)
        batches = []
        for row in rows:
            if batches and padded(batches[-1] + row) <= tokens_per_microbatch:
                batches[-1] += row
            else:
                batches.append(row)
        shares.append(batches)
    most = max(map(len, shares))
    mine = shares[rank()]
    return mine + [[]] * (most - len(mine))


def in_microbatches(function, rollouts, model, config, chosen=None, *clear):
    """A list with function(indices) of each micro-batch. If memory runs out, `clear` (functions, or
    None) give some back, and all starts again with half the tokens in each."""

    def all_of_them():
        batches = microbatches(rollouts, model, config.tokens_per_microbatch, chosen)
        return [function(some) for some in batches]

    return halve_until_it_fits(all_of_them, config, *clear)


def padded_batch(rollouts, model):
    """tokens (batch, time), padded on the right, where causal attention does not see it; mask
    (batch, time - 1), True where the NEXT token belongs to a response; and, as keywords, what the
    model needs besides to read rows of several responses. Two responses in a row:

        token      Q Q Q a a a Q b b .     the prompt's last token comes before each response,
        position   0 1 2 3 4 5 2 3 4 .     so each response token follows what predicts it
        part       0 0 1 1 1 1 2 2 2 .     a token sees part 0 and its own, up to itself

    The order of the response tokens, row after row, is that of the rollouts."""
    complete = all(r.prompt and r.response for r in rollouts)
    require(complete, "a rollout with an empty prompt or response: leave it out")
    rows = shared_rows(rollouts, model)
    columns = []  # of each row: (time, 4) token, is it of a response?, position, part
    for row in rows:
        *before, last = rollouts[row[0]].prompt
        column = [(token, 0, position, 0) for position, token in enumerate(before)]
        for part, i in enumerate(row, 1):
            column.append((last, 0, len(before), part))
            for position, token in enumerate(rollouts[i].response, len(before) + 1):
                column.append((token, 1, position, part))
        columns.append(torch.tensor(column))
    if not rows:  # of a process whose share is empty: a prompt with no response
        columns = [torch.zeros(2, 4, dtype=torch.long)]
    padded = pad_sequence(columns, batch_first=True)  # (batch, time, 4)
    tokens, of_response, positions, parts = padded.to(next(model.parameters()).device).unbind(-1)
    mask = of_response[:, 1:] == 1
    if len(rows) == len(rollouts):
        return tokens, mask, {}
    parts = parts[:, :-1]  # the last column is only ever a target
    # (batch, time - 1, time - 1): may the token of this line see the one of that column?
    sees = (parts[:, :, None] == parts[:, None]) | (parts[:, None] == 0)
    sees = sees.tril()[:, None]  # the same for all heads
    return tokens, mask, {"position_ids": positions[:, :-1], "attention_mask": sees}


def shares_prompts(model):
    """Does the model compute the same for several responses in a row as for each alone? Tried once
    a model. Not with sliding windows, which count columns: the try is too short to show it."""
    backbone = getattr(model, "backbone", None) or model.base_model
    if not hasattr(backbone, "shares_prompts"):
        config = backbone.config.get_text_config()
        layers = set(getattr(config, "layer_types", None) or ["full_attention"])
        window = getattr(config, "sliding_window", None)
        backbone.shares_prompts = layers == {"full_attention"} and window is None
        if backbone.shares_prompts:  # set already: `padded_batch` asks for it in the try
            backbone.shares_prompts = reads_alike(backbone)
    return backbone.shares_prompts


@torch.no_grad()
def reads_alike(backbone):
    no_dropout(backbone)
    vocab = len(backbone.get_input_embeddings().weight)
    prompt, *responses = torch.arange(8).remainder(vocab).split([3, 2, 3])
    rollouts = [SimpleNamespace(prompt=prompt.tolist(), response=r.tolist()) for r in responses]

    def hidden(some):
        tokens, mask, sharing = padded_batch(some, backbone)
        output = backbone(input_ids=tokens[:, :-1], use_cache=False, **sharing)
        return output.last_hidden_state[mask].float()  # (tokens, width)

    try:
        together, apart = hidden(rollouts), torch.cat([hidden([r]) for r in rollouts])
    except Exception as error:  # whatever a model raises that takes no such mask
        if is_out_of_memory(error):
            raise
        return False
    tolerance = 1e-3 if backbone.dtype.itemsize > 2 else 0.05  # as a share of the largest
    return bool((together - apart).abs().max() <= tolerance * apart.abs().max())


def padded_lists(rollouts, lists):
    """Lists with a tensor a rollout, of a number for each response token -> (rollouts, longest), on
    the CPU. {name: list} -> {name: padded}; None is left out."""
    lengths = [len(r.response) for r in rollouts]
    padded = {}
    for name, entries in lists.items():
        if entries is not None:
            padded[name] = pad_sequence(entries, batch_first=True)
            fits = [len(entry) for entry in entries] == lengths
            need = "needs a tensor a rollout, with a finite number for each response token"
            require(fits and padded[name].isfinite().all(), f"{name}: {need}")
    return padded
