"""Lossless speculation: the next tokens are guessed, and one pass of the model over all of them says how many were right.

    speculation = open_speculation("auto", bundle)          # opening.py; an engine does it
    sequence.drafter = speculation.drafter(sequence.prompt) # drafter.py: who guesses for one sequence
    turn.advance(backend, cache, sequences)                 # what decode.advance does where somebody guesses

After a guess the reply is chosen as ever, from the model's own logits at each place with the sampler's own next draw, and the
guess only decided how many of these logits one pass made. So greedy replies are those of plain decoding, token for token, and
samples are those that the same seed draws without speculation (near ties of logits aside, where a backend rounds otherwise for
several tokens; the native core does not). That is the accept rule of Leviathan et al. (2023) and Chen et al. (2023) for a guess
made with certainty: the draw falls on it with the probability that the model gives it, and a draw that does not is one from the
rest. Penalties, grammars, log probabilities, stop tokens and lengths hold by themselves.

Not here: the model's first layers as its draft. Untrained, they do not say what the last one says: with the final norm and head, the
first 6, 12, 18 and 24 of SmolLM2-135M's 30 layers agree with all 30 on 4, 5, 7 and 17% of the tokens of an encyclopedia, on 9, 14, 17
and 40% of speeches, and on 1, 4, 7 and 23% of code, at a fifth to four fifths of the cost of a step each.

Who guesses: matches.py (what followed the last time), ngrams.py (a file of the bundle), draft_model.py (a smaller bundle). How
many tokens a pass may check is decided by pace.py, from what passes cost here and how often guesses of that kind (odds.py) held.
"""
