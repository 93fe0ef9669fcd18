"""Small tokenizers in the forms of released models, with the files that lie beside them, trained on a few lines."""

import io
import json
import pathlib

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXT = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "Which of the two summaries is better? The better summary is 1 or 2.",
    "user: how are you today?\nassistant: I am fine, thank you.\n\nsystem: be brief and be kind",
    "def add(first, second):\n    return first + second\n",
] * 4
UNICODE = "naïve café, 漢字かな, עברית, 🙂👩‍👧 é \u200b\u00a0 \t\r\n ½ ﬁ"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def write_json(path: pathlib.Path, found: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")


def write_files(directory: pathlib.Path, tokenizer: Tokenizer, config: dict, generation: dict) -> pathlib.Path:
    """tokenizer.json, tokenizer_config.json and generation_config.json; the tokenizer's own class in transformers."""
    write_json(directory / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | config)
    write_json(directory / "generation_config.json", generation)
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def special(*texts: str, rstrip: bool = False) -> list[AddedToken]:
    return [AddedToken(text, rstrip=rstrip, normalized=False, special=True) for text in texts]


def byte_level(*specials: str) -> Tokenizer:
    """As Llama 3, Qwen and Pythia have it; special tokens come last."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False))
    made.add_special_tokens(special(*specials))
    return made


def byte_fallback(specials: tuple[str, ...], *, prefix: bool) -> Tokenizer:
    """Spaces are U+2581 and rare characters bytes: with a space before every text as Llama 2 and Mistral have it, or
    without as Gemma has it. Special tokens come first."""
    spaces = normalizers.Replace(" ", "▁")
    made = Tokenizer(models.BPE())
    made.normalizer = spaces
    made.train_from_iterator(
        [line for text in TEXT for line in text.split(" ")], trainers.BpeTrainer(vocab_size=200, show_progress=False)
    )
    learned = json.loads(made.to_str())["model"]
    pieces = [*specials, *BYTES, "▁", *sorted(learned["vocab"], key=learned["vocab"].get)]
    vocab = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    merges = [tuple(merge) for merge in learned["merges"]]
    made = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", 1, 0)] if prefix else [])
    )
    made.add_special_tokens(special(*specials))
    return made


def begins_with(tokenizer: Tokenizer, bos: str) -> Tokenizer:
    """Texts begin with BOS where special tokens are added."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return tokenizer


def llama3(directory: pathlib.Path, **config: object) -> pathlib.Path:
    names = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    made = begins_with(byte_level(*names), names[0])
    return write_files(
        directory,
        made,
        {"bos_token": names[0], "eos_token": names[4], **config},
        {"eos_token_id": [made.token_to_id(names[1]), made.token_to_id(names[4])]},
    )


def mistral(directory: pathlib.Path, **config: object) -> pathlib.Path:
    made = begins_with(byte_fallback(("<unk>", "<s>", "</s>"), prefix=True), "<s>")
    eos = {"__type": "AddedToken", "content": "</s>"}
    named = {"bos_token": "<s>", "eos_token": eos, "unk_token": "<unk>", "pad_token": None}
    return write_files(directory, made, {"add_bos_token": True, **named, **config}, {"eos_token_id": 2})


def gemma(directory: pathlib.Path, **config: object) -> pathlib.Path:
    made = byte_fallback(("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"), prefix=False)
    made.add_tokens([AddedToken("\n\n", normalized=False), AddedToken("<table>", normalized=False)])
    named = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return write_files(directory, begins_with(made, "<bos>"), {**named, **config}, {"eos_token_id": [1, 5]})


def phi3(directory: pathlib.Path, **config: object) -> pathlib.Path:
    """Its special tokens take the spaces behind them."""
    made = byte_fallback(("<unk>", "<s>", "</s>", "<|endoftext|>"), prefix=True)
    made.add_special_tokens(special("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", rstrip=True))
    named = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "add_bos_token": False}
    ends = [made.token_to_id("<|endoftext|>"), made.token_to_id("<|end|>")]
    return write_files(directory, made, {**named, **config}, {"eos_token_id": ends})


def qwen(directory: pathlib.Path, **config: object) -> pathlib.Path:
    """Without BOS, and with added tokens that are no special ones."""
    made = byte_level("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    made.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    named = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "add_bos_token": False}
    return write_files(directory, made, {**named, **config}, {"eos_token_id": made.token_to_id("<|im_end|>")})


FAMILIES = {"llama3": llama3, "mistral": mistral, "gemma": gemma, "phi3": phi3, "qwen": qwen}


def sentencepiece_model(path: pathlib.Path, *, prefix: bool, symbols: tuple[str, ...] = ()) -> pathlib.Path:
    """As Llama 2 has it (prefix) or Gemma: `symbols` are found in any text."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT),
        model_writer=written,
        vocab_size=400,
        hard_vocab_limit=False,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=False,
        user_defined_symbols=list(symbols),
        minloglevel=2,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(written.getvalue())
    return path
