"""A student from a model's own layers, over architectures that name and vary their layers differently."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from teachercache.errors import ModelError, UserError
from teachercache.models.activations import path_of_blocks
from teachercache.models.loading import load_causal_lm, load_tokenizer
from teachercache.tokens.fingerprint import tokenizer_fingerprint
from teachercache.tokens.token_bytes import CHARACTER_OF, TokenBytes
from teachercache.training.initialise.embedding_transfer import check_tokenizers, transplant_embeddings
from teachercache.training.initialise.init_student import init_student
from teachercache.training.initialise.layer_choice import chosen_layers

from builders import tiny_tokenizer
from tokenizer_families import SMALL, byte_level

ROOT = Path(__file__).parents[3]
LAYERS = 6
IDS = torch.arange(40)[None]
WIDTH: dict[str, int] = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": LAYERS,
                         "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
PATHS = {"llama": "model.layers", "llama-untied": "model.layers", "gemma2": "model.layers", "gpt2": "transformer.h"}


def _config(kind: str) -> Any:
    from transformers import Gemma2Config, GPT2Config, LlamaConfig

    if kind == "gpt2":
        return GPT2Config(vocab_size=300, n_embd=16, n_layer=LAYERS, n_head=2, n_positions=64)
    if kind == "gemma2":  # layers differ: sliding and full attention take turns, in config.layer_types
        return Gemma2Config(**WIDTH, head_dim=8, sliding_window=4)
    return LlamaConfig(**WIDTH, tie_word_embeddings=kind == "llama")


def _save(folder: Path, kind: str) -> Path:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(_config(kind)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=list(PATHS))
def teacher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return _save(tmp_path_factory.mktemp(request.param), request.param), PATHS[request.param]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _save(tmp_path_factory.mktemp("llama"), "llama")


def _logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_causal_lm(str(folder))(input_ids=IDS, use_cache=False).logits


def test_keeping_all_layers_reproduces_the_model(teacher: tuple[Path, str], tmp_path: Path) -> None:
    made = init_student(str(teacher[0]), layers="every:1", output=tmp_path / "student")
    assert torch.equal(_logits(tmp_path / "student"), _logits(teacher[0]))
    assert made["parameters"] == made["teacher_parameters"]


def test_kept_layers_are_the_models_own(teacher: tuple[Path, str], tmp_path: Path) -> None:
    """Weights are equal layer by layer, everything outside the layers too; the student runs."""
    made = init_student(str(teacher[0]), layers="0,3,5", output=tmp_path / "student")
    source, student = load_causal_lm(str(teacher[0])), load_causal_lm(made["student"])
    kept = student.get_submodule(teacher[1])
    assert len(kept) == 3 and made["layers"] == [0, 3, 5] and made["teacher_layers"] == LAYERS
    for layer, index in zip(kept, (0, 3, 5), strict=True):
        original = source.get_submodule(teacher[1])[index].state_dict()
        assert all(torch.equal(value, original[name]) for name, value in layer.state_dict().items())
    outside = {name: value for name, value in source.state_dict().items() if not name.startswith(teacher[1])}
    assert all(torch.equal(student.state_dict()[name], value) for name, value in outside.items())
    assert made["parameters"] == student.num_parameters() < source.num_parameters()
    assert _logits(tmp_path / "student").isfinite().all()


def test_the_student_is_the_model_without_the_other_layers(teacher: tuple[Path, str], tmp_path: Path) -> None:
    """Twin: cut the layers out of the loaded model itself. The first ones keep their indices, so both must agree."""
    init_student(str(teacher[0]), layers="first:3", output=tmp_path / "student")
    source: Any = load_causal_lm(str(teacher[0]))
    del source.get_submodule(teacher[1])[3:]
    source.config.num_hidden_layers = 3
    with torch.no_grad():
        expected = source(input_ids=IDS, use_cache=False).logits
    assert torch.equal(_logits(tmp_path / "student"), expected)


def test_tied_embeddings_stay_tied(teacher: tuple[Path, str], tmp_path: Path) -> None:
    init_student(str(teacher[0]), layers="keep:2", output=tmp_path / "student")
    for folder in (teacher[0], tmp_path / "student"):
        model = load_causal_lm(str(folder))
        is_tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
        assert is_tied == model.config.tie_word_embeddings


def test_lists_of_one_entry_a_layer_follow_the_layers(tmp_path: Path) -> None:
    source = _save(tmp_path / "gemma2", "gemma2")
    init_student(str(source), layers="1,3,4", output=tmp_path / "student")
    before, after = (json.loads((tmp_path / n / "config.json").read_text()) for n in ("gemma2", "student"))
    assert after["layer_types"] == [before["layer_types"][index] for index in (1, 3, 4)]
    assert len(set(after["layer_types"])) == 2


def test_the_folder_is_plain_and_complete(llama: Path, tmp_path: Path) -> None:
    init_student(str(llama), layers="keep:2", output=tmp_path / "new" / "student")
    files = {path.name for path in (tmp_path / "new" / "student").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= files
    assert str(llama) not in (tmp_path / "new" / "student" / "config.json").read_text()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["student"]
    same = (tokenizer_fingerprint(load_tokenizer(str(folder))) for folder in (llama, tmp_path / "new" / "student"))
    assert len(set(same)) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_checkpoints_precision_is_kept(llama: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    load_causal_lm(str(llama)).to(dtype).save_pretrained(tmp_path / "half")
    load_tokenizer(str(llama)).save_pretrained(tmp_path / "half")
    init_student(str(tmp_path / "half"), layers="keep:2", output=tmp_path / "student")
    assert load_causal_lm(str(tmp_path / "student"), dtype="auto").dtype == dtype


@pytest.mark.parametrize(
    ("choice", "kept"),
    [("0,5,2", [0, 5, 2]), (" 1 , 3 ", [1, 3]), ("every:4", [0, 4]), ("keep:3", [0, 3, 5]), ("keep:1", [0]),
     ("keep:6", [0, 1, 2, 3, 4, 5]), ("first:2", [0, 1])],
)  # fmt: skip
def test_ways_to_choose(choice: str, kept: list[int]) -> None:
    assert chosen_layers(choice, count=LAYERS) == kept


@given(count=st.integers(2, 200), data=st.data())
def test_evenly_spaced_layers_are_distinct_and_span_the_model(count: int, data: st.DataObject) -> None:
    size = data.draw(st.integers(2, count))
    kept = chosen_layers(f"keep:{size}", count=count)
    gaps = {after - before for before, after in itertools.pairwise(kept)}
    assert (kept[0], kept[-1], len(kept)) == (0, count - 1, size)
    assert min(gaps) >= 1 and max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("0,6", "no layer 6.*0 to 5"),
        ("-1", "no layer -1"),
        ("1,2,1", "layer 1 occurs more than once"),
        ("", "chooses none"),
        (",", "chooses none"),
        ("keep:0", "from 1 to 6"),
        ("keep:7", "from 1 to 6"),
        ("last:2", "no way to choose"),
        ("keep:two", "not a whole number"),
        ("a,b", "not a whole number"),
    ],
)
def test_choices_that_make_no_model_are_refused(choice: str, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        chosen_layers(choice, count=LAYERS)
    assert "\n" not in str(caught.value)


def test_an_output_that_is_taken_is_left_alone(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for overwrite, message in ((False, "--overwrite"), (True, "no model")):
        with pytest.raises(UserError, match=message):
            init_student(str(llama), layers="keep:2", output=tmp_path, overwrite=overwrite)
    with pytest.raises(UserError, match="come from"):
        init_student(str(llama), layers="keep:2", output=llama, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_overwriting_replaces_an_earlier_student(llama: Path, tmp_path: Path) -> None:
    output = tmp_path / "student"
    for layers, overwrite in (("keep:2", False), ("keep:3", True)):
        init_student(str(llama), layers=layers, output=output, overwrite=overwrite)
    assert load_causal_lm(str(output)).config.num_hidden_layers == 3


def test_an_architecture_without_a_list_of_layers_is_refused(llama: Path, tmp_path: Path) -> None:
    """Mamba-like and recurrent models vary; here a config that counts layers otherwise than the model does."""
    from teachercache.training.initialise.init_student import path_of_layers

    model: Any = load_causal_lm(str(llama))
    model.config.num_hidden_layers = LAYERS + 1
    with pytest.raises(ModelError, match="does not keep its layers in one list"):
        path_of_layers(model, "some/model")


def test_layers_whose_kind_depends_on_their_index_are_refused_in_one_line(tmp_path: Path) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(**WIDTH, head_dim=8, moe_intermediate_size=8, num_experts=2, num_experts_per_tok=1,
                            mlp_only_layers=[0])  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "moe")
    tiny_tokenizer().save_pretrained(tmp_path / "moe")
    with pytest.raises(ModelError, match="decides by a layer's index") as caught:
        init_student(str(tmp_path / "moe"), layers="1,2", output=tmp_path / "student")
    assert "\n" not in str(caught.value) and not (tmp_path / "student").exists()
    assert init_student(str(tmp_path / "moe"), layers="0,2", output=tmp_path / "student")["layers"] == [0, 2]


def _rows_by_hand(weight: torch.Tensor, old: Any, new: Any) -> tuple[torch.Tensor, dict[str, int]]:
    """A token at a time. The tokenizers here are byte-level or spell spaces as ▁, and have <unk>, <s> and </s>."""
    sides, rows, counts = (TokenBytes.of(old), TokenBytes.of(new)), [], {"copied": 0, "averaged": 0, "mean": 0}
    by_bytes = {value: index for index, value in enumerate(sides[0].values) if value}
    for index, value in enumerate(sides[1].values):
        if index in (new.bos_token_id, new.eos_token_id):
            ids, how = [old.bos_token_id if index == new.bos_token_id else old.eos_token_id], "copied"
        elif value is None or value == b"":
            token = new.convert_ids_to_tokens(index)
            ids, how = ([old.convert_tokens_to_ids(token)], "copied") if token in old.get_vocab() else ([], "mean")
        elif value in by_bytes:
            ids, how = [by_bytes[value]], "copied"
        else:
            try:
                ids, how = old(value.decode(), add_special_tokens=False)["input_ids"], "averaged"
            except UnicodeDecodeError:
                text = "".join(CHARACTER_OF[byte] for byte in value)
                ids, how = [piece.id for piece in old.backend_tokenizer.model.tokenize(text)], "averaged"
        counts[how] += 1
        rows.append(weight[ids].float().mean(0) if ids else weight[: len(old)].float().mean(0))
    return torch.stack(rows).to(weight.dtype), counts


@pytest.fixture(scope="module", params=["llama", "llama-untied", "gpt2"])
def byte_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer has BOS and EOS, its embeddings padded to more rows than there are tokens."""
    from transformers import AutoModelForCausalLM

    folder, config = tmp_path_factory.mktemp(request.param), _config(request.param)
    config.vocab_size = 448
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    byte_level().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["tiktoken", "SentencePiece BPE, Llama 2", "Unigram, byte fallback"])
def test_embeddings_for_another_vocabulary_are_made_of_the_models(byte_model: Path, tmp_path: Path, kind: str) -> None:
    new, old = SMALL[kind](), byte_level()
    new.save_pretrained(tmp_path / "tokenizer")
    made = init_student(
        str(byte_model), layers="keep:2", output=tmp_path / "student", tokenizer=str(tmp_path / "tokenizer")
    )
    source, student = load_causal_lm(str(byte_model)), load_causal_lm(str(tmp_path / "student"))
    expected, counts = _rows_by_hand(source.get_input_embeddings().weight, old, new)
    assert made["embeddings"] == counts and sum(counts.values()) == len(new) and counts["averaged"] > 15
    torch.testing.assert_close(student.get_input_embeddings().weight.detach(), expected.detach())
    expected, _ = _rows_by_hand(source.get_output_embeddings().weight, old, new)
    torch.testing.assert_close(student.get_output_embeddings().weight.detach(), expected.detach())
    assert student.config.vocab_size == len(new) and len(student.get_submodule(path_of_blocks(student) or "")) == 2
    for config in (student.config, student.generation_config):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (
            new.bos_token_id,
            new.eos_token_id,
            None,
        )
    saved = load_tokenizer(str(tmp_path / "student"))
    assert tokenizer_fingerprint(saved) == tokenizer_fingerprint(new)
    with torch.no_grad():
        assert student(**new("the cat sat", return_tensors="pt", return_token_type_ids=False)).logits.isfinite().all()


def test_the_models_own_tokenizer_changes_nothing_but_padding(byte_model: Path, tmp_path: Path) -> None:
    made = init_student(str(byte_model), layers="every:1", output=tmp_path / "student", tokenizer=str(byte_model))
    assert made["embeddings"] == {"copied": len(byte_level()), "averaged": 0, "mean": 0}
    assert torch.equal(_logits(tmp_path / "student"), _logits(byte_model)[..., : len(byte_level())])


def test_tokenizers_without_bytes_are_refused_in_one_line(llama: Path, tmp_path: Path) -> None:
    SMALL["WordPiece, cased"]().save_pretrained(tmp_path / "wordpiece")
    with pytest.raises(ModelError, match="wordpiece does not define the bytes") as caught:
        init_student(str(llama), layers="keep:2", output=tmp_path / "student", tokenizer=str(tmp_path / "wordpiece"))
    assert "\n" not in str(caught.value) and not (tmp_path / "student").exists()
    with pytest.raises(ModelError, match="holds no model"):
        init_student(str(llama), layers="keep:2", output=tmp_path / "student", tokenizer=str(tmp_path))


def test_slow_tokenizers_are_refused_for_a_transplant() -> None:
    from transformers import ByT5Tokenizer

    with pytest.raises(ModelError, match="slow"):
        check_tokenizers({"byt5": ByT5Tokenizer()})


def test_models_with_further_weights_for_each_token_are_refused(byte_model: Path) -> None:
    """Gemma 3n has embeddings for every layer."""
    model: Any = load_causal_lm(str(byte_model))
    model.embeddings_of_layers = torch.nn.Embedding(448, 4)
    with pytest.raises(ModelError, match="weights for each token beside its embeddings"):
        transplant_embeddings(model, old=byte_level(), new=SMALL["tiktoken"](), name="some/model")


def test_the_command_says_how_embeddings_were_made(llama: Path, tmp_path: Path) -> None:
    SMALL["tiktoken"]().save_pretrained(tmp_path / "tokenizer")
    command = [sys.executable, "-m", "teachercache", "init-student", str(llama), "--layers", "keep:2",
               "--out", str(tmp_path / "student"), "--tokenizer", str(tmp_path / "tokenizer"), "--json"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "pipeline"), "COLUMNS": "200"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)["embeddings"]
    assert sum(made.values()) == len(SMALL["tiktoken"]()) and f"{made['averaged']} averaged" in done.stderr
