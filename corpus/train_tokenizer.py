"""Train the corpus's byte-level BPE and save it in Hugging Face form.

    python corpus/train_tokenizer.py --files corpus/train --vocab-size 8192 --output corpus/tokenizer

The same files give the same tokenizer.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ray_dwm.data.text import Document, find_files, read_documents

END_OF_TEXT = "<|endoftext|>"
# Words with their leading space, single digits, runs of punctuation, runs of white space.
SPLIT = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def texts(files: list[Path]) -> Iterator[str]:
    """All texts of the files, in order."""
    for file in files:
        for record in read_documents(file, "domain"):
            if isinstance(record, Document):
                yield record.text


def train(files: list[Path], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of the given size, end-of-text marker included."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(files), trainer)
    return tokenizer


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", required=True, help="folder, glob or file of documents")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--output", required=True, type=Path)
    arguments = parser.parse_args()
    tokenizer = train(find_files(arguments.files, "--files"), arguments.vocab_size)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    ).save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
