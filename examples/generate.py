"""Generate in process: load a checkpoint with glmx.LLM, complete prompts, look at log-probs.

    python examples/generate.py MODEL [PROMPT ...]

MODEL is a Hugging Face directory of a GLM-4.5 model or the folder of a training run: `runs/tiny` after
examples/pretrain.py, `demo-out` after `make demo`.
"""

import argparse

import glmx

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("model", metavar="MODEL")
parser.add_argument("prompts", metavar="PROMPT", nargs="*", default=["def main():", "import os\n", "class Node:"])
parser.add_argument("--max-tokens", type=int, default=48)
args = parser.parse_args()

llm = glmx.LLM(args.model)

print("greedy, with the log-prob of each token and the one after it in rank:")
greedy = glmx.SamplingParams(temperature=0, max_tokens=args.max_tokens, logprobs=2)
for result in llm.generate(args.prompts, greedy):
    best = result.outputs[0]
    print(f"--- {result.prompt!r} -> {len(best.token_ids)} tokens, {best.finish_reason}, {best.cumulative_logprob:.3f}")
    print(best.text)
    first = sorted(best.logprobs[0].values(), key=lambda one: one.rank)
    print("first token:", ", ".join(f"{one.decoded_token!r} {one.logprob:.3f}" for one in first))

print("sampled; a seed gives the same text in any batch:")
sampled = glmx.SamplingParams(temperature=0.8, top_p=0.95, seed=7, max_tokens=args.max_tokens)
together = llm.generate(args.prompts, sampled)
alone = llm.generate(args.prompts[-1], sampled)[0]
print(together[-1].outputs[0].text)
print(
    "alone and in a batch:", "equal" if alone.outputs[0].token_ids == together[-1].outputs[0].token_ids else "DIFFERENT"
)
