"""Pre-training from a TOML file: text to tokenizer, tokenizer to shards, shards to a checkpoint.

    python examples/pretrain.py                      # this Python's own sources, a few minutes of one core
    python examples/pretrain.py --corpus DIR         # any directory of text
    python examples/pretrain.py --train.tokens 40960 # further words are overrides of the TOML's keys

The last step is `glmx pretrain examples/pretrain.toml`; interrupted with Ctrl-C, the same command goes on.
"""

import argparse
from pathlib import Path

from glmx.data import corpus, shards, tokenizer
from glmx.models.config import ModelConfig
from glmx.train.config import load_config
from glmx.train.loop import pretrain

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--corpus", type=Path, help="a directory of text (default: Python's standard library)")
args, overrides = parser.parse_known_args()
config = load_config(Path(__file__).with_name("pretrain.toml"), overrides)

data = Path(config.data.shards)
if not (data / "tokenizer.json").is_file():
    text = corpus.directory(args.corpus) if args.corpus else corpus.standard_library()
    print(text.summary())
    train = [document.text for document in text.train]
    vocabulary = tokenizer.train(train, ModelConfig.from_dir(config.model).vocab_size)
    shards.write_documents(data, "train", vocabulary, train)
    shards.write_documents(data, "heldout", vocabulary, [document.text for document in text.heldout])
    vocabulary.save(data)  # last: its presence says that the shards are complete

result = pretrain(config)
print(f"{result.tokens:,} tokens; held-out bits per byte: {result.heldout_bpb}; checkpoint: {result.checkpoint}")
