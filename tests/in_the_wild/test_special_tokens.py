"""End tokens named in several files, and the files of a tokenizer through conversions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recycle_ds.checkpoint import CheckpointError
from recycle_ds.checkpoint.conversion.convert import Conversion, convert
from recycle_ds.checkpoint.loading import load_model
from recycle_ds.data.errors import DataError
from recycle_ds.data.tokenizer import Tokenizer
from recycle_ds.inference.answers import text_of
from recycle_ds.inference.loading import engine_of
from recycle_ds.inference.parameters import SamplingParams
from tests.in_the_wild.folders import byte_tokenizer, edit_json
from tests.unit.checkpoint.families import save

SPECIAL = ("<|eot|>", "<|eom|>", "<|pad|>", "<|begin|>", "<|last|>")
EOT, EOM, PAD, BEGIN, LAST = range(257, 262)
CONFIG, GENERATION = "config.json", "generation_config.json"


def chat_folder(folder: Path) -> Path:
    """A model that names each of its end tokens in another file."""
    save("llama", folder)
    byte_tokenizer(folder, *SPECIAL)
    edit_json(folder / CONFIG, eos_token_id=[EOT, EOM], bos_token_id=BEGIN, pad_token_id=PAD)
    (folder / GENERATION).write_text(json.dumps({"eos_token_id": [EOM, LAST], "temperature": 0.6, "do_sample": True}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<|pad|>"}))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return folder


def test_decoding_stops_at_the_union(tmp_path: Path) -> None:
    """Prevents a chat model from writing on after its turn because only one file's end token counts."""
    loaded = load_model(str(chat_folder(tmp_path)))
    assert sorted(loaded.tokenizer.end_ids) == [256, EOT, EOM, LAST]
    engine = engine_of(loaded, 1, None)
    for end in sorted(loaded.tokenizer.end_ids):
        params = SamplingParams(max_new_tokens=4, temperature=0, logit_bias=((end, 1000.0),))
        (answer,) = engine.add(list(b"ab"), params, "autoregressive")
        engine.finish([answer])
        assert answer.ended_at is not None
        found = answer.generation(answer.ended_at)
        assert (found.token_ids, found.finish_reason) == ((end,), "eos")


def test_an_end_token_is_not_part_of_the_text(tmp_path: Path) -> None:
    """Prevents the text of an answer from ending in an end token that only generation_config.json names."""
    folder = chat_folder(tmp_path)
    letter = load_model(str(folder)).tokenizer.encode("z")[0]
    edit_json(folder / GENERATION, eos_token_id=letter)
    loaded = load_model(str(folder))
    assert text_of(loaded.tokenizer, SamplingParams(), [*loaded.tokenizer.encode("ab"), letter]) == "ab"


@pytest.mark.parametrize("middle", ["portable", "megatron", "hf"])
def test_conversions_keep_ids_and_files(tmp_path: Path, middle: str) -> None:
    """Prevents a converted chat model from losing an end token, its padding, its sampling settings or its template."""
    source = chat_folder(tmp_path / "source")
    convert(str(source), str(tmp_path / "middle"), Conversion(middle))
    convert(str(tmp_path / "middle"), str(tmp_path / "back"), Conversion("hf"))
    back = tmp_path / "back"
    config = json.loads((back / CONFIG).read_text())
    assert set(config["eos_token_id"]) == {256, EOT, EOM, LAST}
    assert (config["bos_token_id"], config["pad_token_id"]) == (BEGIN, PAD)
    generation = json.loads((back / GENERATION).read_text())
    assert set(generation["eos_token_id"]) >= {EOM, LAST} and generation["temperature"] == 0.6
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        assert (back / name).read_bytes() == (source / name).read_bytes(), name
    for folder in (tmp_path / "middle", back):
        assert Tokenizer.load(next(folder.rglob("tokenizer.json"))).end_ids == {256, EOT, EOM, LAST}
    from transformers import GenerationConfig

    assert set(GenerationConfig.from_pretrained(back).eos_token_id) >= {EOM, LAST}


def test_generation_settings_that_name_everything_keep_their_bytes(tmp_path: Path) -> None:
    """Prevents a file from being rewritten, in another order or notation, for ids that it names already."""
    source = chat_folder(tmp_path / "source")
    text = f'{{"eos_token_id":\n [{EOT}], "bos_token_id": {BEGIN}, "pad_token_id": {PAD}, "top_p": 0.9}}'
    (source / GENERATION).write_text(text)
    edit_json(source / CONFIG, eos_token_id=EOT)
    for target in ("portable", "megatron", "hf"):
        convert(str(source), str(tmp_path / target), Conversion(target))
        (written,) = (tmp_path / target).rglob(GENERATION)
        assert written.read_text() == text


def test_ids_that_nothing_names_are_null(tmp_path: Path) -> None:
    """Prevents transformers from taking a family's default ids, which are other tokens, or beyond the vocabulary."""
    save("smollm3", tmp_path / "source")
    names = ("eos_token_id", "bos_token_id", "pad_token_id")
    edit_json(tmp_path / "source" / CONFIG, drop=names)
    (tmp_path / "source" / GENERATION).unlink(missing_ok=True)
    convert(str(tmp_path / "source"), str(tmp_path / "back"), Conversion("hf"))
    config = json.loads((tmp_path / "back" / CONFIG).read_text())
    assert [config[name] for name in names] == [None, None, None]


def test_several_chat_templates(tmp_path: Path) -> None:
    """Prevents all chat templates but one from being lost in a conversion."""
    from transformers import AutoTokenizer

    source = chat_folder(tmp_path / "source")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("tools: {{ messages[0].content }}")
    expected = AutoTokenizer.from_pretrained(source).chat_template
    assert expected == {"default": "{{ messages[0].content }}", "tool_use": "tools: {{ messages[0].content }}"}
    convert(str(source), str(tmp_path / "portable"), Conversion("portable"))
    convert(str(tmp_path / "portable"), str(tmp_path / "back"), Conversion("hf"))
    assert AutoTokenizer.from_pretrained(tmp_path / "back").chat_template == expected


def test_the_end_token_of_older_files(tmp_path: Path) -> None:
    """Prevents a guess by name where special_tokens_map.json or config.json names the end token."""
    byte_tokenizer(tmp_path, *SPECIAL)
    edit_json(tmp_path / "tokenizer_config.json", drop=("eos_token",))
    edit_json(tmp_path / "special_tokens_map.json", eos_token={"content": "<|eot|>", "lstrip": False})
    assert (Tokenizer.load(tmp_path).eos_id, Tokenizer.load(tmp_path).end_ids) == (EOT, {EOT})
    (tmp_path / "special_tokens_map.json").unlink()
    edit_json(tmp_path / CONFIG, eos_token_id=[EOM, 5000], bos_token_id=-1)
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.eos_id, loaded.end_ids) == (EOM, {EOM})
    assert Tokenizer(loaded.to_json(), loaded.config).eos_id == EOM, "another process builds its copy of these"


def test_an_end_token_without_a_token(tmp_path: Path) -> None:
    """Prevents the word None of a document from being a special token because a model's end id has no token."""
    byte_tokenizer(tmp_path, hole=7)
    (tmp_path / GENERATION).write_text(json.dumps({"eos_token_id": [256, 7]}))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.special_tokens == {"<|endoftext|>": 256} and loaded.end_ids == {256}
    assert loaded.special_pattern.search("None of it") is None


@pytest.mark.parametrize("value", ["2", True, [2.5], {"id": 2}, [[2]]])
@pytest.mark.parametrize("name", [CONFIG, GENERATION])
def test_ids_that_are_none(tmp_path: Path, name: str, value: object) -> None:
    """Prevents a stack trace, and an end token that is silently ignored."""
    folder = chat_folder(tmp_path / "source")
    edit_json(folder / name, eos_token_id=value)
    with pytest.raises(DataError, match=rf"{name}: eos_token_id=.*: must be the id of a token, or null"):
        load_model(str(folder))
    with pytest.raises((CheckpointError, DataError), match="eos_token_id="):
        convert(str(folder), str(tmp_path / "out"), Conversion("hf"))
    assert not (tmp_path / "out").exists()
