"""Makes tests/fixtures/tokenizer/ with Hugging Face's `tokenizers` (0.23.3):

  train.txt   text both tokenizers were trained on
  text.txt    text to encode: several scripts, digits, contractions, all kinds of white space
  hf.json     trained by Hugging Face; hf.ids: text.txt in it
  ours.json   trained on train.txt by `winnow data train-tokenizer --vocab 400`; ours.ids: text.txt in it, by Hugging Face

  python make_tokenizer_fixture.py WINNOW_PROGRAM
"""
import pathlib
import random
import subprocess
import sys

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

OUT = pathlib.Path(__file__).resolve().parent.parent / "fixtures" / "tokenizer"
LICENSE = OUT.parent.parent.parent / "LICENSE"

ALPHABETS = [  # first and last code point
    (0x20, 0x7E), (0x09, 0x0D), (0x20, 0x20), (0x30, 0x39), (0x85, 0x85), (0xA0, 0xFF), (0x300, 0x30F), (0x391, 0x3A9),
    (0x430, 0x44F), (0x5D0, 0x5EA), (0x660, 0x669), (0x905, 0x930), (0x1680, 0x1680), (0x180E, 0x180E), (0x2000, 0x200D),
    (0x2028, 0x202F), (0x2150, 0x2160), (0x3000, 0x3002), (0x3041, 0x3060), (0x4E00, 0x4E20), (0xAC00, 0xAC20),
    (0xFF10, 0xFF20), (0x1D400, 0x1D410), (0x1F600, 0x1F610)]
PIECES = ["'s", "'ll", "'ve", "'re", "'d", "'LL", "  ", "\n\n", " \t", "\r\n", " the", "Software", " 2026", "''", "e\u0301"]


def mixed_text(rng):
    parts = []
    for _ in range(1500):
        low, high = rng.choice(ALPHABETS)
        parts.append("".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 4))))
        if rng.random() < 0.3:
            parts.append(rng.choice(PIECES))
    return "".join(parts)


def write_ids(name, ids):
    (OUT / name).write_text(" ".join(map(str, ids)) + "\n")


def main():
    rng = random.Random(1)
    OUT.mkdir(parents=True, exist_ok=True)
    license_text = LICENSE.read_text()
    train = license_text + mixed_text(rng)[:1500]
    (OUT / "train.txt").write_bytes(train.encode())
    text = license_text[:400] + mixed_text(rng)
    (OUT / "text.txt").write_bytes(text.encode())

    hf = Tokenizer(models.BPE())
    hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    hf.decoder = decoders.ByteLevel()
    hf.train_from_iterator([train], trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    hf.save(str(OUT / "hf.json"))
    write_ids("hf.ids", hf.encode(text).ids)

    subprocess.run([sys.argv[1], "data", "train-tokenizer", "--vocab", "400", "--out", str(OUT / "ours.json"),
                    str(OUT / "train.txt")], check=True)
    ours = Tokenizer.from_file(str(OUT / "ours.json"))
    ids = ours.encode(text).ids
    assert ours.decode(ids) == text and ours.get_vocab_size() == 400 and ours.token_to_id("<|endoftext|>") == 399
    write_ids("ours.ids", ids)


main()
