"""Run by the Python of an installation of onnxruntime-genai, which has nothing of ours: `python genai.py FOLDER THREADS`.

Prints {"version", "load_ms"}; then for each line "PROMPT_TOKENS NEW_TOKENS" {"token_ms": when each token was there}.
"""

import json
import random
import sys
import time


def answer(folder, threads):
    import onnxruntime_genai as og
    start = time.perf_counter()
    config = og.Config(folder)
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = og.Model(config)
    print(json.dumps({"version": og.__version__, "load_ms": (time.perf_counter() - start) * 1e3}), flush=True)
    for line in sys.stdin:
        prompt_tokens, new_tokens = map(int, line.split())
        prompt = random.choices(range(100, 10000), k=prompt_tokens)
        parameters, length = og.GeneratorParams(model), prompt_tokens + new_tokens
        parameters.set_search_options(do_sample=False, min_length=length, max_length=length)
        generator, times, start = og.Generator(model, parameters), [], time.perf_counter()
        generator.append_tokens(prompt)
        while len(times) < new_tokens:
            generator.generate_next_token()
            times.append((time.perf_counter() - start) * 1e3)
        print(json.dumps({"token_ms": times}), flush=True)


if __name__ == "__main__":
    answer(sys.argv[1], int(sys.argv[2]))
