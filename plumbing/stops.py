"""What ends a response: stop tokens, and maybe a text."""

import bisect


class StopText:
    """A text that ends a response, besides its stop tokens. ids: these; decode: ids -> text."""

    def __init__(self, ids, text, decode):
        self.ids = ids
        self.text = text
        self.decode = decode

    def locate(self, tokens):
        """(first, end): tokens[:end] has the whole text, and none of it is in tokens[:first].
        None: it is not there. The text may start and end inside of tokens."""
        if self.text not in self.decode(tokens):
            return None
        # A longer prefix has a longer text, so both are found by bisection over prefixes.
        prefixes = range(len(tokens) + 1)
        end = bisect.bisect_left(prefixes, True, key=lambda i: self.text in self.decode(tokens[:i]))
        before = len(self.decode(tokens[:end]).partition(self.text)[0])  # characters
        first = bisect.bisect(range(end), before, key=lambda i: len(self.decode(tokens[:i]))) - 1
        return first, end


def stops_of(model, given):
    """(set of token ids, StopText or None) of the argument `stop_ids` of `generate`."""
    text = given if isinstance(given, StopText) else None
    ids = text.ids if text else given
    if ids is None:
        ids = model.generation_config.eos_token_id
    ids = [ids] if isinstance(ids, int) else ids
    if not ids:
        way_out = "pass stop_ids, or set eos_token_id in the model's generation_config"
        raise ValueError(f"no stop token: {way_out}")
    return frozenset(ids), text
